"""Render the images of a folder and wait for the end: a program of its own, which is ended or killed.

    python -m tests.views.sharing_images MEMORY ROOT NUM_WORKERS

Prints its process and the sum of the pixels of each batch, as JSON; ends once there is a file ROOT.end.
"""

import json
import os
import sys
import time
from pathlib import Path

from logitcache.store import shared_memory
from logitcache.views.datasets import ImageFolder
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, ViewSpec

if __name__ == "__main__":
    shared_memory.MEMORY = Path(sys.argv[1])
    views = Views(ImageFolder(root=sys.argv[2]).open(), ViewSpec())
    loader = ViewLoader(views, int(sys.argv[3]), "fork")
    batches = [[ViewKey(0, index) for index in range(start, start + 8)] for start in range(0, 40, 8)]
    print(json.dumps([os.getpid(), *(int(images.sum()) for images in loader.render(batches))]), flush=True)
    while not Path(f"{sys.argv[2]}.end").exists():
        time.sleep(0.01)
    loader.close()
