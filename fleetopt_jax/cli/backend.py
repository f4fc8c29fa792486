"""JAX as the commands use it: 64-bit floats, and compiled programs kept from one run to the next.

They lie in `$FLEETOPT_CACHE`, else in `$XDG_CACHE_HOME/fleetopt_jax`, else in `~/.cache/fleetopt_jax`, in one folder
for a kind of processor, for a program runs on the kind it was compiled for. Delete the folder to clear it;
`FLEETOPT_CACHE=off` keeps nothing.
"""

import hashlib
import os
import platform
import warnings
from importlib.metadata import version
from pathlib import Path

MIN_COMPILE_S = 0.05  # what compiles faster is not worth a file
# Compiles two thirds as long on the CPU as with the newer emitters, and what runs for milliseconds runs as fast (the
# simulator, which runs for long, undoes it). Only where it was tried: an XLA that does not know a flag ends the
# process.
QUICK_COMPILE, TRIED_WITH = "--xla_cpu_use_fusion_emitters=false", "0.10.1"


def configure() -> None:
    """Set JAX up, before any array is made: queueing needs float64."""
    # XLA calls two tuning hints of its own (prefer-no-gather, prefer-no-scatter) missing features of the processor, two
    # lines on stderr for every program it loads; errors still reach us as exceptions.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") in (None, "1"):  # 1 is JAX's own default, perhaps a parent process's
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    flags = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib") == TRIED_WITH and "xla_cpu_use_fusion_emitters" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK_COMPILE}".strip()
    import jax

    jax.config.update("jax_enable_x64", True)
    folder = cache_folder()
    if folder is not None:
        warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def cache_folder() -> Path | None:
    """Where compiled programs are kept; None where nothing is."""
    asked = os.environ.get("FLEETOPT_CACHE")
    if asked == "off":
        return None
    try:
        base = Path(asked) if asked else _user_caches() / "fleetopt_jax"
        folder = base / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: slower, not worse
        return None
    return folder if os.access(folder, os.W_OK) else None


def _user_caches() -> Path:
    asked = os.environ.get("XDG_CACHE_HOME")
    return Path(asked) if asked else Path.home() / ".cache"


def _processor() -> str:
    """A name of the kind of processor: two kinds never share a folder."""
    kind = [platform.system(), platform.machine(), platform.processor()]
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text(errors="replace").splitlines()
        kind += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(kind).encode()).hexdigest()[:12]
