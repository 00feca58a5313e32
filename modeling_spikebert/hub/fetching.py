"""Reading models: what is fetched from the Hub is said before, and what cannot be read is said in one sentence."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from ..console.loudness import said_on_failure, say

PATIENCE = 10  # seconds for an answer


def reach_hub(*names: str | None, repo_type: str = "model") -> None:
    """For names of models or data sets that will be read, before the first of them is.

    Without an answer of the Hub `from_pretrained` and `load_dataset` go on trying, for about half a minute each.

    Args:
        names: folders, names on the Hub, or None. Those that are here already, or in the cache, are passed over.
        repo_type: `"model"` or `"dataset"`.

    Raises:
        OSError: the Hub does not answer.
        ValueError: a name is neither a folder nor possible on the Hub.
    """
    for name in names:
        if name is None or Path(name).exists() or constants.HF_HUB_OFFLINE:
            continue
        try:
            snapshot_download(name, repo_type=repo_type, local_files_only=True)
            continue
        except HFValidationError as error:
            raise ValueError(f"{name}: there is no such folder, and it is no name on the Hub. Check it.") from error
        except LocalEntryNotFoundError:
            print(f"Fetching {name} from {constants.ENDPOINT}.", file=sys.stderr, flush=True)
        try:
            HfApi().repo_info(name, repo_type=repo_type, timeout=PATIENCE)
        except OSError:
            pass  # it answers; who fetches says what is wrong
        except Exception as error:  # of the HTTP library
            raise OSError(
                f"{name} is not on this machine, and {constants.ENDPOINT} does not answer ({error}). Check the name, "
                "or the network."
            ) from error


@contextmanager
def loading(name: str, tokenizer_alone: bool = False) -> Iterator[None]:
    """For reading a model, its config or tokenizer, from a folder or the Hub.

    Args:
        name: of the folder, or on the Hub.
        tokenizer_alone: whether a folder need not hold a model.

    Raises:
        OSError: a file is missing, or the Hub does not answer.
        ValueError: a folder holds no model, the files are damaged, or they do not belong together.
    """
    reach_hub(name)
    if not tokenizer_alone:
        check_holds_model(name)
    try:
        yield
    except (ImportError, OSError):
        raise
    except Exception as error:  # a damaged file makes transformers raise nearly anything
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{name} cannot be loaded: {reason.rstrip('.!')}. Is each of its files whole, and do they belong together?"
        ) from error


def check_holds_model(name: str) -> None:
    """Refuses a folder that has no config, such as one of a run, and names the model in it."""
    folder = Path(name)
    if not folder.is_dir() or (folder / "config.json").exists():
        return
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    student = folder / "student"  # of a quickstart, which has a teacher as well
    hint = f"Did you mean {student if student in inside else inside[0]}?" if inside else "Name the folder of a model."
    raise ValueError(f"{name} holds no model: there is no config.json. {hint}")


def load_model(cls: Any, name: str, to_be_trained: bool = False, **kwargs: Any) -> Any:
    """`cls.from_pretrained(name, **kwargs)`, which says in a line what transformers reports in a table.

    Args:
        cls: of the model, or an Auto class.
        name: of the folder, or on the Hub.
        to_be_trained: whether weights that the checkpoint lacks are as they should be.
        **kwargs: of `from_pretrained`.
    """
    check_holds_model(name)
    with said_on_failure("transformers.modeling_utils"):
        model, info = cls.from_pretrained(name, output_loading_info=True, **kwargs)
    weights = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    new = sorted({weight.rpartition(".")[0] for weight in weights})
    if new:
        others = f" and {len(new) - 5} more" if len(new) > 5 else ""
        start = "New, and learned now" if to_be_trained else "New, from random weights"
        say(f"{start}: {', '.join(new[:5])}{others}. The rest is that of {name}.")
    return model
