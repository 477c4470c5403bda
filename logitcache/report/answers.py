"""What the teachers of a cache answer, for people: probabilities, and the names of classes."""

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.cache.cache import Cache
from logitcache.cache.predicted_classes import predicted_classes
from logitcache.errors import RecipeError
from logitcache.report.inspect import labels_as_seen
from logitcache.targets import Targets
from logitcache.views.datasets.base import is_multi_label
from logitcache.views.keys import ViewKey


def class_names(cache: Cache) -> tuple[str, ...]:
    """Return the names of the teachers' classes: of the images if recorded and as many, else of the models if known.

    Without either they are their numbers.
    """
    counts = {entry.num_classes for entry in cache.manifest.teachers.values() if entry.num_classes}
    names, count = cache.manifest.class_names, max(counts, default=0)
    if names is not None and len(names) == count:
        return names
    return predicted_classes(cache.manifest.teachers.values(), count) or tuple(map(str, range(count)))


def label_names(cache: Cache, key: ViewKey) -> tuple[str, ...]:
    """Name the classes of a view as the teacher saw it; none if it has no label."""
    label = labels_as_seen(cache, [key])[0]
    found = np.flatnonzero(label > 0) if label.ndim else [label] if label >= 0 else []
    names = cache.manifest.class_names
    return tuple(str(c) if names is None else names[c] for c in found)


def probabilities(cache: Cache, targets: Targets) -> NDArray[np.float32]:
    """Return a teacher's probabilities [B, C]: a softmax; a sigmoid by class if images are of any number of classes.

    Raises RecipeError if these need logits that are not kept.
    """
    if not is_multi_label(cache.labels):
        return targets.log_probs().exp().numpy()
    if not targets.keeps_logits:
        raise RecipeError(
            f"{cache.location} keeps no logits of images of any number of classes. Fix: a cache that keeps every logit "
            "(kind: dense, uint8, transform or head)"
        )
    return torch.sigmoid(targets.logits).numpy()
