"""Arrays that look usable and are not: views with flags, other devices, fake tensors.

Each must raise, or give the right numbers; never a result of the wrong numbers.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import rmsnorm
import torch
from floats import F32, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def x():
    return torch.linspace(-1, 2, 24).reshape(3, 8)


def test_an_out_that_requires_grad(x):
    out = torch.full((3, 8), 7.0, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^out\b"):
        rmsnorm.rms_norm(x, out=out)
    assert (out == 7).all()


def test_meta_tensors(x):
    meta, out = torch.empty(3, 8, device="meta"), torch.full((3, 8), 7.0)
    for call in (
        lambda: rmsnorm.rms_norm(meta),
        lambda: rmsnorm.rms_norm(x, torch.empty(8, device="meta"), out=out),
        lambda: rmsnorm.rms_norm(x, out=torch.empty(3, 8, device="meta")),
        lambda: rmsnorm.rms_norm(meta, torch.ones(8), out=out),
        lambda: rmsnorm.add_rms_norm(x, meta, out=out),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError, BufferError)):
            call()
    assert (out == 7).all()
    with pytest.raises(Exception, match=r"x\b.*") as caught:
        rmsnorm.rms_norm(meta)
    assert "meta" in str(caught.value) or "device" in str(caught.value).lower()


def test_fake_tensors(x):
    with FakeTensorMode() as mode:
        fake = torch.empty(3, 8)
        weight = torch.empty(8)
    out = torch.full((3, 8), 7.0)
    for call in (
        lambda: rmsnorm.rms_norm(fake),
        lambda: rmsnorm.rms_norm(x, weight, out=out),
        lambda: rmsnorm.rms_norm(fake, out=out),
        lambda: rmsnorm.rms_norm(x, out=fake),
    ):
        with pytest.raises(Exception, match=r"(?i)fake|tensor|x|weight|out"):
            call()
    assert (out == 7).all()
    assert mode is not None


def test_complex_tensors_and_lazy_conjugates():
    z = torch.ones(3, 8, dtype=torch.complex64)
    for tensor in (z, z.conj()):
        with pytest.raises(TypeError, match=r"^x\b.*complex"):
            rmsnorm.rms_norm(tensor)


def test_negative_bit_views(x):
    """The imaginary part of a lazy conjugate is a real view whose memory has the other sign."""
    z = torch.complex(torch.zeros(3, 8), x)
    view = z.conj().imag
    assert view.is_neg()
    expected = rmsnorm.rms_norm(-x)
    try:
        y = rmsnorm.rms_norm(view)
    except (RuntimeError, TypeError, ValueError, BufferError):
        pass
    else:
        assert_same_bits(y.resolve_neg().numpy(), expected.numpy())
    weight = z[0].conj().imag
    try:
        y = rmsnorm.rms_norm(x, weight)
    except (RuntimeError, TypeError, ValueError, BufferError):
        pass
    else:
        assert_same_bits(y.numpy(), rmsnorm.rms_norm(x, -x[0]).numpy())
    target = torch.complex(torch.zeros(3, 8), torch.zeros(3, 8)).conj().imag
    try:
        rmsnorm.rms_norm(x, out=target)
    except (RuntimeError, TypeError, ValueError, BufferError):
        assert (target == 0).all()
    else:
        assert_same_bits(target.resolve_neg().numpy(), rmsnorm.rms_norm(x).numpy())


def test_negative_bits_under_other_strides(x):
    """as_strided keeps the bit, and gives the view strides that no imaginary part has."""
    for dtype in (torch.complex64, torch.complex128):
        view = torch.complex(torch.zeros(6, 9), torch.ones(6, 9)).to(dtype).conj().imag
        for strides in ((5, 1), (1, 3), (7, 2), (2, 5), (0, 1)):
            for odd in (view, view[1:, 1:], view.detach()):
                tensor = odd.as_strided((3, 5), strides)
                assert tensor.is_neg()
                weight, out = tensor[0], torch.full((3, 5), 7.0)
                with pytest.raises(ValueError, match=r"^x\b.*negative bit"):
                    rmsnorm.rms_norm(tensor, out=out)
                with pytest.raises(ValueError, match=r"^weight\b.*negative bit"):
                    rmsnorm.rms_norm(x[:, :5], weight, out=out)
                with pytest.raises(ValueError, match=r"^out\b.*negative bit"):
                    rmsnorm.rms_norm(x[:, :5], out=tensor)
                assert (out == 7).all()


def test_strides_of_negated_tensors_without_the_bit(x):
    """Whatever begins between two elements of a complex number is asked, and taken."""
    wide = torch.cat([x, x], 1)
    for offset in range(4):
        part = wide[:, offset : offset + 8]
        assert_same_bits(rmsnorm.rms_norm(part).numpy(), rmsnorm.rms_norm(part.clone()).numpy())


@pytest.mark.parametrize("to_layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_tensors_without_strided_memory(x, to_layout):
    if to_layout == "to_mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    odd = getattr(x, to_layout)()
    out = torch.full((3, 8), 7.0)
    with pytest.raises((TypeError, ValueError, RuntimeError, BufferError)):
        rmsnorm.rms_norm(odd, out=out)
    with pytest.raises((TypeError, ValueError, RuntimeError, BufferError)):
        rmsnorm.rms_norm(x, out=odd)
    assert (out == 7).all()


def test_quantized_and_integer_tensors(x):
    with pytest.raises(TypeError, match=r"^x\b.*int64"):
        rmsnorm.rms_norm(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^x\b.*float8"):
        rmsnorm.rms_norm(x.to(torch.float8_e4m3fn))


class Doubling(torch.Tensor):
    """A subclass that means something else than its memory holds."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("this tensor must be asked through torch")


class Plain(torch.Tensor):
    pass


def test_tensor_subclasses(x):
    with pytest.raises((RuntimeError, TypeError, BufferError)):
        rmsnorm.rms_norm(x.as_subclass(Doubling))
    try:
        y = rmsnorm.rms_norm(x.as_subclass(Plain))
    except TypeError as error:
        assert str(error).startswith("x")
    else:
        assert_same_bits(y.as_subclass(torch.Tensor).numpy(), rmsnorm.rms_norm(x).numpy())


def test_functorch_wrappers(x):
    """Inside vmap a tensor is a wrapper whose memory is not its own."""
    with pytest.raises(Exception, match=r"(?i)tensor|x|vmap|storage|data"):
        torch.vmap(lambda row: rmsnorm.rms_norm(row))(x)


def test_a_jax_array_as_out():
    """JAX arrays are immutable; DLPack of some versions does not say so."""
    out = jnp.full((3, 8), 7.0)
    with pytest.raises((TypeError, ValueError), match=r"^out\b"):
        rmsnorm.rms_norm(np.ones((3, 8), F32), out=out)
    with pytest.raises((TypeError, ValueError), match=r"^out\b"):
        rmsnorm.rms_norm(jnp.ones((3, 8)), out=out)
    with pytest.raises((TypeError, ValueError), match=r"^residual_out\b"):
        rmsnorm.add_rms_norm(jnp.ones((3, 8)), jnp.ones((3, 8)), residual_out=out)
    np.testing.assert_array_equal(np.asarray(out), np.full((3, 8), 7))


def test_jax_tracers():
    import jax

    with pytest.raises(Exception, match=r"(?i)trace|x\b"):
        jax.jit(lambda v: rmsnorm.rms_norm(v))(jnp.ones((3, 8)))


class Broken:
    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        raise KeyError("the producer's own error")


class NotACapsule(Broken):
    def __dlpack__(self, **options):
        return 17


class OnAnotherDevice(Broken):
    def __dlpack_device__(self):
        return (2, 0)  # CUDA


def test_dlpack_producers_that_fail(x):
    for producer in (Broken(), NotACapsule(), OnAnotherDevice()):
        with pytest.raises(Exception, match=r"x\b|producer"):
            rmsnorm.rms_norm(producer)
        out = np.full((3, 8), 7, F32)
        with pytest.raises(Exception, match=r"weight\b|producer"):
            rmsnorm.rms_norm(x.numpy(), producer, out=out)
        assert (out == 7).all()


def test_torch_out_from_inference_mode_and_views(x):
    with torch.inference_mode():
        out = torch.empty(3, 8)
        rmsnorm.rms_norm(x, out=out)
    assert_same_bits(out.numpy(), rmsnorm.rms_norm(x).numpy())
    wide = torch.zeros(3, 16)
    rmsnorm.rms_norm(x, out=wide[:, ::2])
    assert_same_bits(wide[:, ::2].numpy().copy(), rmsnorm.rms_norm(x).numpy())
    assert (wide[:, 1::2] == 0).all()
    with pytest.raises(ValueError, match=r"^out\b"):
        rmsnorm.rms_norm(x, out=torch.full((1, 8), 7.0).expand(3, 8))
