"""Bytes of the vendor's own packers: not one may differ."""

import numpy as np
import pytest
import torch
from kernel_cases import GOLDEN, widen

from hma_kernels import bfp8_pack, bfp8_unpack, reference

SETS = [
    "normal_f32",
    "wide_f32",
    "ties_f32",
    "specials_f32",
    "raggedpad_f32",
    "kv_hd64_bf16",
    "kv_hd128_bf16",
]
KV_SETS = SETS[-2:]


def bytes_of(x, rounding, implementation):
    if implementation == "reference":
        return reference.pack(x, rounding)
    return bfp8_pack(torch.from_numpy(x), rounding=rounding).numpy()


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("name", SETS)
def test_host_packer(golden, name, implementation):
    got = bytes_of(golden(f"{name}.in"), "host", implementation)
    np.testing.assert_array_equal(got.ravel(), golden(f"{name}.packed"))


@pytest.mark.parametrize("name", KV_SETS)
def test_host_packer_from_bf16(golden, name):
    x = torch.from_numpy(golden(f"{name}.in")).bfloat16()
    got = bfp8_pack(x, rounding="host")
    np.testing.assert_array_equal(got.numpy().ravel(), golden(f"{name}.packed"))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("name", KV_SETS)
def test_device_packer(golden, name, implementation):
    got = bytes_of(golden(f"{name}.in"), "device", implementation)
    np.testing.assert_array_equal(got.ravel(), golden(f"{name}.packed_device"))


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_device_packer_on_wide_range(implementation):
    with np.load(GOLDEN / "device_bh_sim.npz") as data:
        got = bytes_of(widen(data["bf16_in"]), "device", implementation)
        np.testing.assert_array_equal(got.ravel(), data["packed"].ravel())


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("name", SETS)
def test_unpack(golden, name, implementation):
    x, expected = golden(f"{name}.in"), golden(f"{name}.unpacked_bf16bits")
    tiles = golden(f"{name}.packed").reshape(reference.pack(x, "host").shape)
    if implementation == "reference":
        bits = reference.unpack(tiles).view(np.uint32) >> 16
    else:
        bits = bfp8_unpack(torch.from_numpy(tiles)).view(torch.uint16).numpy()
    np.testing.assert_array_equal(bits[..., : x.shape[-2], : x.shape[-1]], expected)
