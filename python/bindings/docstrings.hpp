// What help() shows, and the stubs with it.
#pragma once

namespace rmsnorm::python::doc {

constexpr const char* module =
    "RMSNorm on arrays of NumPy, torch, CuPy, JAX and everything else that speaks DLPack, without "
    "a copy.";

constexpr const char* rms_norm = R"(Root mean square layer normalization.

For every row, that is, for the elements of x over the axes `axis` ... -1 together::

    rstd = 1 / sqrt(mean(x**2) + eps)
    y    = x * rstd * (weight_offset + weight) + bias

Computed in float32, or in float64 as soon as one of the arrays is float64. Rows whose squares
overflow or underflow come out right. The result is the same bit for bit on every CPU and for any
number of threads, batch size and strides; on CUDA on every device of one architecture.

On CUDA the call launches one kernel and returns without waiting for it.

Where a torch tensor requires grad, the call is an operator of rmsnorm.torch and its result can be
differentiated.

Args:
    x: Array of float16, bfloat16, float32 or float64, with at least one dimension and any strides.
        NumPy (bfloat16 by ml_dtypes), torch, CuPy, JAX, or any array with ``__dlpack__``, on the
        CPU or on CUDA; all arrays of a call on one device. Beside CUDA arrays, managed and pinned
        memory is taken as well.
    weight: Array of the shape of the normalized axes, ``x.shape[axis:]``, optionally after leading
        dimensions that broadcast against those of x as in NumPy (per head, per sample). Any of the
        four dtypes. None: ones.
    bias: As weight, added at the end. None: nothing is added.
    eps: Added to the mean square inside the root; in units of x squared; finite, >= 0.
    axis: First normalized axis; the norm runs over it and all axes after it.
    weight_offset: Added to weight in the compute type; 1.0 for weights stored around zero (Gemma).
    rounding: Where half precision rounds.
        "once": at the end only (OLMo 2, Gemma, torch.nn.functional.rms_norm).
        "before_weight": x * rstd is rounded to the dtype of x, then multiplied by the weight in the
        dtype that both promote to, and the bias is added likewise (Llama, Mistral, Qwen).
        "rstd": as "before_weight" with rstd itself rounded to the dtype of x first.
    partial: In (0, 1]; the mean is taken over the first ceil(partial * n) elements of a row
        (pRMSNorm).
    out: Array for the result, of the shape of x, of any of the four dtypes, any strides and any
        framework whose arrays can be written. It may be x itself; any other overlap with an
        argument is refused.
    out_dtype: dtype of the result, as a string ("bfloat16") or a dtype of NumPy, ml_dtypes, JAX or
        torch; must agree with out. None: out's, or else that of x.
    return_rstd: Return (y, rstd) with rstd of shape ``x.shape[:axis]``, float32, or float64 where
        that is computed in.
    stream: For CUDA arrays: the stream to launch on, as torch.cuda.Stream, cupy.cuda.Stream, any
        object with ``__cuda_stream__``, or the cudaStream_t as an integer. Memory must then stay
        alive until the stream is done with it. None: the current stream of x's framework (torch,
        CuPy), else the default stream.

Returns:
    y, or (y, rstd): out if given, else a new array of x's framework on x's device. For an array of
    any other library, one that its ``from_dlpack`` makes: that of its array namespace
    (``__array_namespace__``), of its type, or of the package that defines the type. Where there is
    none, a rmsnorm.ExportedArray, which every ``from_dlpack`` takes.

Raises:
    TypeError: An argument is of the wrong kind, or its dtype is not one of the four.
    ValueError: Shapes or values do not fit, memory overlaps, or out cannot be written.
    RuntimeError: A torch tensor requires grad and its gradient would be lost, since out, stream or
        arrays of another framework are given too; RMSNORM_ISA is not the name of an instruction set
        that can run here, an array is on CUDA and this build has none or CUDA reports an error, or
        it is on a device of another kind. Nothing has been written then.

Examples:
    >>> import numpy as np
    >>> import rmsnorm
    >>> x = np.array([[1, 7], [2, 14]], np.float32)
    >>> rmsnorm.rms_norm(x, np.array([1, 10], np.float32), eps=0.0)
    array([[ 0.2, 14. ],
           [ 0.2, 14. ]], dtype=float32)
    >>> y, rstd = rmsnorm.rms_norm(x, eps=0.0, return_rstd=True)
    >>> rstd
    array([0.2, 0.1], dtype=float32))";

constexpr const char* add_rms_norm = R"(Residual add and RMSNorm in one pass over memory.

For every row, that is, over the axes `axis` ... -1 together::

    s = x + residual
    residual_out = s
    rstd = 1 / sqrt(mean(s**2) + eps)
    y    = s * rstd * (weight_offset + weight) + bias

Args:
    x: As in rms_norm.
    residual: Array of the shape of x, any of the four dtypes.
    weight, bias, eps, axis, weight_offset, rounding: As in rms_norm, with s in place of x and the
        dtype of residual_out in place of x's.
    round_residual: True: the norm is taken of s rounded to the dtype of residual_out, as the model
        that adds and then normalizes computes. False: of the sum before it is rounded.
    out: Array for y, of the shape of x. It may be x or residual itself.
    residual_out: Array for s, of the shape of x. It may be x or residual itself.
    return_rstd: Return (y, residual_out, rstd); rstd as in rms_norm.
    stream: As in rms_norm.

Returns:
    (y, residual_out) or (y, residual_out, rstd), new arrays in x's framework unless given. y has
    the dtype of x, residual_out the one that x and residual promote to (float16 with bfloat16:
    float32).

Raises:
    TypeError, ValueError, RuntimeError: As rms_norm; nothing has been written then.

Examples:
    >>> import numpy as np
    >>> import rmsnorm
    >>> x, residual = np.array([[1, 3]], np.float32), np.array([[0, 4]], np.float32)
    >>> y, residual = rmsnorm.add_rms_norm(x, residual, eps=0.0)
    >>> y
    array([[0.2, 1.4]], dtype=float32)
    >>> residual
    array([[1., 7.]], dtype=float32))";

constexpr const char* rms_norm_backward = R"(The gradients of rms_norm and add_rms_norm.

Given dy, the gradient of y, for every row of n elements, of which the first k are counted in the
mean (k = n unless partial is given), with w = weight_offset + weight and xhat = x * rstd::

    c      = sum(dy * w * xhat) / k
    dx     = (dy * w - c * xhat) * rstd + d_residual
    dweight = sum over rows of dy * xhat
    dbias   = sum over rows of dy

That is the derivative of the formula without its roundings: gradients pass through roundings
unchanged. Computed in float32, or in float64 as soon as one of the arrays is float64, rstd and
mean_square apart. dweight and dbias are summed in a fixed order, so that they are the same bit for
bit on every CPU and for any number of threads.

For ``y, residual_out = add_rms_norm(a, b, ...)`` x is residual_out, d_residual the gradient of
residual_out, and dx the gradient of a and of b. With ``round_residual=False`` x is a and residual
is b.

Args:
    dy: Gradient of y, of the shape of x; any of the four dtypes and any strides.
    x: What was normalized: the x of rms_norm, or the residual_out of add_rms_norm.
    weight: As it was given to the forward call.
    rstd: float32 or float64 array of shape ``x.shape[:axis]``, as the forward call returned it.
        None: computed from x.
    eps, axis, weight_offset, partial: As they were given to the forward call.
    rounding: As in rms_norm. Checked, so that the options of variant() can be passed on; it makes
        no difference.
    residual: Array of the shape of x: the norm was taken of x + residual, not rounded.
    mean_square: As it was given to rms_norm_apply. rstd then does not depend on x, c is 0 in dx,
        and the gradient of mean_square is returned as well.
    d_residual: Array of the shape of x, added to dx.
    has_bias: Return dbias.
    needs_dweight: False: dweight is not computed, as for a weight that is not trained.
    dx_out: Array for dx, of the shape of x, any of the four dtypes. It may be dy, x, residual or
        d_residual itself; any other overlap with an argument is refused.
    dweight_out: Array for dweight, of the shape of weight, any of the four dtypes.
    dbias_out: Array for dbias, of a shape that a bias may have, any of the four dtypes; as
        has_bias.
    stream: As in rms_norm.

Returns:
    (dx, dweight, dbias), and d_mean_square as a fourth where mean_square is given; new arrays of
    x's framework unless given. dx has the dtype of x. dweight has the shape and dtype of weight,
    summed over the rows that share it; None without weight. dbias has the shape
    ``x.shape[axis:]`` and the dtype of weight, else of x; None unless asked for. d_mean_square has
    the shape and dtype of mean_square.

Raises:
    TypeError, ValueError, RuntimeError: As rms_norm; nothing has been written then. A torch tensor
        that requires grad is refused: gradients that can be differentiated again are those of
        rmsnorm.torch.

Examples:
    >>> import numpy as np
    >>> import rmsnorm
    >>> x, weight = np.array([[1, 7]], np.float32), np.ones(2, np.float32)
    >>> y, rstd = rmsnorm.rms_norm(x, weight, return_rstd=True)
    >>> dy = np.array([[1, 0]], np.float32)
    >>> dx, dweight, dbias = rmsnorm.rms_norm_backward(dy, x, weight, rstd)
    >>> dx.round(4)
    array([[ 0.196, -0.028]], dtype=float32)
    >>> dweight
    array([0.2, 0. ], dtype=float32))";

constexpr const char* mean_square =
    R"(Mean of the squares over the last axis: ``mean(x**2, axis=-1)``.

For rows that are sharded over devices: average the mean squares of equal shards, then give the
result to rms_norm_apply. Unlike in rms_norm, a mean square beyond the range of its dtype is
infinite; a float64 out reaches further.

Args:
    x: As in rms_norm.
    out: float32 or float64 array of shape ``x.shape[:-1]``; it may not overlap x.
    stream: As in rms_norm.

Returns:
    out if given, else a new array of shape ``x.shape[:-1]`` in x's framework: float32, or float64
    for float64 x. In units of x squared.

Raises:
    TypeError, ValueError, RuntimeError: As rms_norm; nothing has been written then.

Examples:
    >>> import numpy as np
    >>> import rmsnorm
    >>> rmsnorm.mean_square(np.array([[1, 7], [2, 14]], np.float32))
    array([ 25., 100.], dtype=float32))";

constexpr const char* rms_norm_apply = R"(The second half of rms_norm, with the statistics given.

    rstd = 1 / sqrt(mean_square + eps)
    y    = x * rstd * (weight_offset + weight) + bias

Args:
    x, weight, bias, eps, axis, weight_offset, rounding, out, out_dtype, stream: As in rms_norm.
    mean_square: float32 or float64 array of shape ``x.shape[:axis]``, as mean_square() returns, in
        units of x squared.

Returns:
    y: out if given, else a new array of x's framework.

Raises:
    TypeError, ValueError, RuntimeError: As rms_norm; nothing has been written then.

Examples:
    >>> import numpy as np
    >>> import rmsnorm
    >>> left, right = np.array([[1.0, 1.0]]), np.array([[7.0, 7.0]])  # a row in two shards
    >>> mean_square = (rmsnorm.mean_square(left) + rmsnorm.mean_square(right)) / 2
    >>> rmsnorm.rms_norm_apply(left, mean_square, eps=0.0)
    array([[0.2, 0.2]]))";

constexpr const char* info = R"(What this installation is and what it uses.

Returns:
    A dictionary:
    "version": the version, as ``rmsnorm.__version__``;
    "cpu_isa": the instruction set in use, or None where RMSNORM_ISA is not the name of one
        that can run here;
    "cpu_isas": all instruction sets that can run here;
    "num_threads": as get_num_threads();
    "openmp": whether this build can use threads;
    "environment": RMSNORM_ISA and RMSNORM_NUM_THREADS as in os.environ, or None;
    "cuda": a dictionary: "built", whether this build has CUDA kernels; "toolkit", the version that
        it was built with; "architectures", those that it has code for; "driver", the version of
        CUDA that the driver can run, None without a driver; "devices", a list of dictionaries with
        "name", "compute_capability", "multiprocessors" and "memory" in bytes.

Examples:
    >>> import rmsnorm
    >>> rmsnorm.info()["version"] == rmsnorm.__version__
    True
    >>> rmsnorm.info()["cpu_isas"][-1]
    'scalar')";

constexpr const char* set_num_threads = R"(Sets the most threads that a call uses, for the process.

Takes precedence over RMSNORM_NUM_THREADS and OpenMP's own settings. Small inputs stay on one thread
in any case, and so does a forked child.

Args:
    n: An integer from 1 to 1024.

Raises:
    TypeError, ValueError: n is no integer, or outside of that range.

Examples:
    >>> import rmsnorm
    >>> rmsnorm.set_num_threads(1)
    >>> rmsnorm.get_num_threads()
    1)";

constexpr const char* get_num_threads = R"(The most threads that a call uses now.

The number given to set_num_threads, else RMSNORM_NUM_THREADS, else OpenMP's (OMP_NUM_THREADS,
threadpoolctl); 1 in a forked child and in a build without OpenMP.

Examples:
    >>> import rmsnorm
    >>> rmsnorm.get_num_threads() >= 1
    True)";

constexpr const char* exported_array =
    R"(A result for an array of a library that does not make arrays of DLPack.

Made by the functions of this package alone, where x is an array with ``__dlpack__`` whose library has
no ``from_dlpack``. Every ``from_dlpack`` takes it (NumPy's, torch's, CuPy's, JAX's), without a copy
and as often as wanted, and so do the functions of this package.

Examples:
    >>> import numpy as np
    >>> import rmsnorm
    >>> class Producer:
    ...     def __init__(self, array):
    ...         self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__
    >>> y = rmsnorm.rms_norm(Producer(np.array([[1, 7]], np.float32)), eps=0.0)
    >>> y
    rmsnorm.ExportedArray(shape=(1, 2), dtype=float32, device=(1, 0))
    >>> np.from_dlpack(y)
    array([[0.2, 1.4]], dtype=float32)
)";

}  // namespace rmsnorm::python::doc
