"""Origin of a checkpoint, as far as its files say: its name on the hub, and its licence."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in an __all__

CARD_FILE = "README.md"
#: A card is a page of text; what is larger is none.
_MOST_CARD_BYTES = 2_000_000


def origin(directory: Path | None, name_in_memory: str = "") -> dict[str, Any]:
    """Return `hub_id` (None where it is not known) and `licence` of the model in a directory.

    `licence` has the fields of a model card's metadata that the files give: `license`, `license_name`, `license_link`.
    A damaged card counts as none. `name_in_memory` is what a model that is in no directory says of itself.
    """
    if directory is None:
        known = _has_owner(name_in_memory) and not Path(name_in_memory).exists()  # else a directory, by its path
        return {"hub_id": name_in_memory if known else None, "licence": {}}
    return {"hub_id": hub_id(directory), "licence": licence(directory)}


def hub_id(directory: Path) -> str | None:
    """Return the hub name of a snapshot in the hub's cache (`models--OWNER--NAME/snapshots/...`); else None."""
    for part in reversed(directory.absolute().parts):
        if part.startswith("models--"):
            name = part.removeprefix("models--").replace("--", "/")
            return name if _has_owner(name) else None
    return None


def _has_owner(name: str) -> bool:
    return name.count("/") == 1 and is_valid_hub_id(name)


def is_valid_hub_id(name: Any) -> bool:
    """Return whether the hub could have a model of this name (there is no look whether it has)."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def licence(directory: Path) -> dict[str, Any]:
    """Return the licence of the model in a directory, from its card, else from a licence file beside it; else {}."""
    card = directory / CARD_FILE
    try:
        known = metadata_load(card) if card.is_file() and card.stat().st_size <= _MOST_CARD_BYTES else None
    except Exception:  # YAML has errors of many types, and another model's card must not stop a run
        known = None
    found = {name: (known or {}).get(name) for name in ("license", "license_name", "license_link")}
    if _is_text(found["license"]):
        return {name: value for name, value in found.items() if _is_text(value)}
    found_files = [path for pattern in ("LICENSE*", "LICENCE*") for path in directory.glob(pattern) if path.is_file()]
    first = min((path.name for path in found_files), default=None)
    return {"license": "other", "license_name": "same-as-base-model", "license_link": first} if first else {}


def _is_text(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item for item in items)
