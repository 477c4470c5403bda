"""The root of a cache: its manifest, and the key of the note of a growth beside it."""

from logitcache.cache.format.layout import require_possible
from logitcache.cache.format.manifest import Manifest, parse_manifest
from logitcache.errors import CacheError
from logitcache.store.base import Store
from logitcache.store.safe_files import parse_json

ROOT = "zarr.json"

GROWING = "digest/growing"
"""The manifest that a cache is growing to: not in the root, which readers of Zarr would not understand."""


def read_manifest(store: Store) -> Manifest:
    """Read and check the manifest of a cache; raise CacheError if there is none that can be used."""
    where = f"{store}/{ROOT}"
    try:
        stored = parse_json(store.read(ROOT))
        attributes = stored["attributes"] if stored["node_type"] == "group" else {}
    except FileNotFoundError as error:
        found = f"is no cache (it has no {ROOT})" if store.path.exists() else "does not exist"
        raise CacheError(f"{store} {found}. Fix: check the path, or make it with `logitcache precompute`") from error
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{where} is damaged: {type(error).__name__}: {error}. Fix: restore it, or remove {store} and make it again"
        ) from error
    manifest = parse_manifest(attributes, str(store))
    require_possible(manifest, str(store))
    return manifest
