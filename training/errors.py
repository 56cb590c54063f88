"""Explain errors to the user in one line: the value, and what to change if that is known."""

import dataclasses
import errno
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from configs.schema import is_text, unknown_setting
from training.launch import override, shell_override

OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

MAX_LENGTH = 300  # of a user's own text quoted in a message


def is_for_the_user(error: Exception) -> bool:
    """Whether the user can do something about the error; any other is a bug in the program."""
    expected = (ValueError, OSError, FloatingPointError, HydraException, OmegaConfBaseException)
    return isinstance(error, expected) or _lacks_memory(error) or _is_compiled_too_often(error)


def _lacks_memory(error: BaseException) -> bool:
    # Errors on the CPU and in CUDA's libraries have no class of their own. The one on GPUs is told
    # by its name: importing torch takes seconds, too long just to report a misspelled setting.
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(words in str(error) for words in OUT_OF_MEMORY)


def _is_compiled_too_often(error: BaseException) -> bool:
    # Its class belongs to torch's compiler, which takes seconds to import.
    return "fail_on_recompile_limit_hit" in str(error)


def explain(error: BaseException) -> str:
    """Return the error in one line: the value, and what to change if that is known."""
    cause = error.__cause__
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        path = str(error.filename)
        longest = max(Path(path).parts, key=len)
        name = longest if len(longest) > 255 else path
        return f"{error.strerror}: {name[:60]}... has {len(name):,} characters; give a shorter one"
    if _lacks_memory(error):
        return (
            f"not enough memory ({_first_part(error)}); a smaller batch_size, eval_batch_size, "
            "model or data set, or a larger grad_accum, needs less"
        )
    if _is_compiled_too_often(error):
        import torch

        return (
            "compile=true, but torch gave up after compiling this network "
            f"{torch._dynamo.config.recompile_limit} times (TORCH_LOGS=recompiles says why); use "
            "compile=false"
        )
    if isinstance(error, RecursionError):
        return "values or folders are nested too deeply"
    if isinstance(error, OverrideParseException):
        return f"{without_middle(str(error.override))}: {without_middle(_grammar_fault(error))}"
    settings = cause if isinstance(cause, OmegaConfBaseException) else error
    if isinstance(settings, ConfigKeyError | ConfigAttributeError) and dataclasses.is_dataclass(
        settings.object_type
    ):
        group, _, key = str(settings.full_key).rpartition(".")
        return unknown_setting(f"{group}." if group else "", key, settings.object_type)
    if isinstance(settings, MissingMandatoryValue | InterpolationToMissingValueError):
        # If a setting refers to one without a value, the message ends with the name of the latter.
        refers = isinstance(settings, InterpolationToMissingValueError)
        key = _first_part(settings).rpartition(" ")[2] if refers else str(settings.full_key)
        return f"{key} has no value; give {key}=..."
    if isinstance(settings, OmegaConfBaseException) and settings.full_key:
        hint = "; write null for no value" if "Value 'None'" in str(settings) else ""
        return f"{settings.full_key}: {_first_part(settings)}{hint}"
    return _first_part(error)


def _grammar_fault(error: OverrideParseException) -> str:
    """Return why Hydra's grammar rejects a word, and how to quote it if it should be text."""
    fault = " ".join(str(error).partition("\nSee https://")[0].split())
    fault = fault.removeprefix(f"Error parsing override '{error.override}'").strip()
    key, equals, value = str(error.override).partition("=")
    if key.startswith("--config-"):  # an option that only train.py has
        return "hydra.searchpath=[DIR] adds a folder with options of yours"
    if not equals:
        return "settings are NAME=VALUE"
    word = override(key, value)
    if not value or not is_text(key) or not _parses(word):
        return fault
    return f"{fault}; quote such text for Hydra and for the shell: {shell_override(key, value)}"


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def without_middle(text: str) -> str:
    """Return ``text``, without its middle if it is too long to read."""
    return text if len(text) <= MAX_LENGTH else f"{text[:200]} ... {text[-100:]}"


def _first_part(error: BaseException) -> str:
    # After these words, Hydra and OmegaConf describe their own internals.
    text = str(error).partition("\n    full_key:")[0].partition("\nConfig search path:")[0]
    return " ".join(text.split()) or type(error).__name__
