"""The images of a cache: recognised by their bytes, their pixels or their names, with the answers of its teachers."""

import io
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from logitcache.cache.cache import open_uncompared
from logitcache.errors import DataError, RecipeError
from logitcache.report.answers import class_names, label_names, probabilities
from logitcache.report.figures.picture import as_image
from logitcache.report.images import views_as_seen
from logitcache.report.look import index_of, scores, unknown_image
from logitcache.student.evaluation.predict import ImageSource
from logitcache.student.evaluation.validation import only_logits
from logitcache.student.runs.trained import MODES
from logitcache.views.datasets.base import digest_of, pixel_digest
from logitcache.views.datasets.images.image_files import decode
from logitcache.views.keys import ViewKey


class KnownImages:
    """A cache and the images that it was made of; no teacher is loaded.

    `overrides` such as dataset.root=DIR locate the images. Raises as `Cache.views` if they are not those of the cache.
    """

    def __init__(self, path: str, overrides: Sequence[str] = (), trust: Collection[str] = ()) -> None:
        self.cache = only_logits(open_uncompared(path))
        if not self.cache.manifest.teachers:
            raise RecipeError(f"{path} keeps no logits of its teachers. Fix: another cache, or none")
        self.views = views_as_seen(self.cache, overrides, trust)
        self.class_names = class_names(self.cache)
        self._digests = self.views.dataset.digests()

    def find(self, content: bytes) -> int | None:
        """Return the index of the image whose file or pixels these bytes hold, the first of equal ones; else None."""
        digests = [digest_of(content)]
        mode = MODES.get(self.cache.manifest.image_shape[0], "RGB")
        try:
            digests.append(pixel_digest(decode(io.BytesIO(content), mode, "")))
        except DataError:
            return None  # the student that reads it next gives the reason
        found = np.flatnonzero(np.isin(self._digests, np.array(digests, np.uint64)))
        return int(found[0]) if len(found) else None

    def index(self, text: str) -> int:
        """Return the index of the image that an id or an index names. Raises RecipeError."""
        ids = self.views.dataset.ids
        if (index := index_of(text, ids)) is None:
            raise RecipeError(f"{self.cache.location} has {unknown_image(text, ids)}")
        return index

    def source(self, index: int) -> ImageSource:
        """Return an image as students read it."""
        dataset = self.views.dataset
        return ImageSource(dataset.ids[index], lambda: as_image(dataset.read(index).numpy()))

    def labels(self, index: int) -> tuple[str, ...]:
        """Return the classes of an image in view 0."""
        return label_names(self.cache, ViewKey(0, index))

    def answers(self, index: int) -> dict[str, NDArray[np.float32]]:
        """Read the probabilities [V, C] that each teacher gave the classes of an image in all views."""
        keys = [ViewKey(view, index) for view in range(self.cache.num_views)]
        return {name: probabilities(self.cache, targets) for name, targets in self.cache.answers(keys).items()}

    def captions(self, answers: Mapping[str, NDArray[np.float32]], view: int) -> Iterator[str]:
        """Yield the lines below a view: its number and, for each teacher, the two most probable classes."""
        yield f"view {view}"
        for name, rows in answers.items():
            yield f"{name}: {', '.join(scores(rows[view], self.class_names, 2))}"
