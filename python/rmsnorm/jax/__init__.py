"""RMSNorm for JAX: functions for jit, grad and vmap, computed by XLA custom calls.

The custom calls run on the CPU on XLA's own threads, and on CUDA, where this build has it, on
XLA's streams.
"""

try:
    import jax
except ImportError as error:
    raise ImportError(
        "rmsnorm.jax: needs JAX; install it with: pip install 'jax>=0.6.2'"
    ) from error
if jax.__version_info__ < (0, 6, 2):
    raise ImportError(f"rmsnorm.jax: needs JAX 0.6.2 or later, got {jax.__version__}")

from .functional import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
