"""Let SGLang 0.5.23 serve on a CPU with nothing but its Python sources.

SGLang's CPU engine wants a build of sgl_kernel that is not on PyPI. Its plain PyTorch paths do
without, but for a few names that they need or that are wrong there. Each is replaced after its
module was imported (``_PATCHES`` says where, the functions why, and what happens without); no file
of SGLang is touched. A name or module that is gone, or another version, ends the server with a
sentence.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

_VERSION = "0.5.23"
_DEFAULT_SEED = 42  # SGLang's own, for requests without a seed


def install() -> None:
    """Patch and stub from now on; costs nothing until SGLang is imported."""
    sys.meta_path.insert(0, _Patcher())
    sys.meta_path.append(_Stubs())  # last: a package that is installed is used


# --- The names that are replaced -----------------------------------------------------------------


def _answer_mla(module: ModuleType) -> None:
    """torch_native has no handler for MLA and gets Triton's, whose prefill expects keys and values
    that it does not cache. Without: wrong log-probs (by 0.7), no error."""
    _require(module, "AttentionBackendRegistry", "_dispatch_mla_subtype")
    module.AttentionBackendRegistry.register("torch_native", module._dispatch_mla_subtype)


def _pin_nothing(module: ModuleType) -> None:
    """The buffer of --enable-return-routed-experts is pinned by the CUDA runtime. Without: the
    server does not start with that flag."""
    _require(module, "_cuda_host_register")
    module._cuda_host_register = lambda *args, **kwargs: None


def _use_no_amx(module: ModuleType) -> None:
    """Our stub of sgl_kernel can be imported, so a CPU with AMX would choose kernels that are not
    there. Without: such a CPU fails at its first product."""
    _require(module, "cpu_has_amx_support", "_is_intel_amx_backend_available")
    module._is_intel_amx_backend_available = lambda: False


def _hash_in_torch(module: ModuleType) -> None:
    """Seeded sampling hashes (seed, position, token) by a kernel of sgl_kernel.
    Without: no seeds."""
    _require(module, "murmur_hash32")
    module.murmur_hash32 = _murmur_hash32


def _always_sample_by_seed(module: ModuleType) -> None:
    """Seeds are used only under --enable-deterministic-inference, which refuses torch_native.
    Without: ``sampling_seed`` is ignored, a sample that is drawn again has other tokens."""
    _require(module, "SamplingBatchInfo")
    _require(module.SamplingBatchInfo, "from_schedule_batch", "sampling_seed")
    original = module.SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls: type, batch: Any, vocab_size: int) -> Any:
        import torch

        info = original(cls, batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        info.sampling_seed = torch.tensor([_DEFAULT_SEED if s is None else s for s in seeds])
        return info

    module.SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)


def _rotate_without_yarn(module: ModuleType) -> None:
    """On CPU, MLA's rotary embedding is written for YaRN only. Without: a DeepSeek-V3 whose
    config.json has no YaRN fails an assertion at its start."""
    _require(module, "get_rope_cpu", "get_rope")
    yarn = module.get_rope_cpu

    def get_rope_cpu(
        head_size: int,
        rotary_dim: int,
        max_position: int,
        base: int,
        is_neox_style: bool = True,
        rope_scaling: dict[str, Any] | None = None,
        *rest: Any,
    ) -> Any:
        scaled = rope_scaling is not None and rope_scaling.get("rope_type") == "deepseek_yarn"
        shape = (head_size, rotary_dim, max_position, base, is_neox_style)
        if scaled and "factor" in rope_scaling:
            return yarn(*shape, rope_scaling, *rest)
        return module.get_rope(*shape)

    module.get_rope_cpu = get_rope_cpu


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "sglang.srt.models.deepseek_common.attention_backend_handler": _answer_mla,
    "sglang.srt.mem_cache.pool_host.common": _pin_nothing,
    "sglang.srt.utils.common": _use_no_amx,
    "sglang.kernels.ops.sampling.murmur_hash": _hash_in_torch,
    "sglang.srt.sampling.sampling_batch_info": _always_sample_by_seed,
    "sglang.srt.layers.rotary_embedding.factory": _rotate_without_yarn,
}


def _require(owner: Any, *names: str) -> None:
    for name in names:
        # A field of a slotted or plain dataclass need not be an attribute of the class.
        if not hasattr(owner, name) and name not in getattr(owner, "__annotations__", {}):
            raise RuntimeError(
                f"{owner.__name__} has no {name!r} any more: read what SGLang does now and change "
                f"{__file__}, which is written for {_VERSION}"
            )


def _murmur_hash32(seed: Any, positions: Any, col_indices: Any) -> Any:
    """MurmurHash3 of (64-bit seed, position, column): [n], [n], [m] -> uint32 [n, m]."""
    import torch

    mask = 0xFFFFFFFF

    def rotated(x: Any, by: int) -> Any:
        return ((x << by) | (x >> (32 - by))) & mask

    def mixed(state: Any, word: Any) -> Any:
        word = rotated((word * 0xCC9E2D51) & mask, 15)
        word = (word * 0x1B873593) & mask
        return (rotated(state ^ word, 13) * 5 + 0xE6546B64) & mask

    seed = seed.to(torch.int64)
    state = mixed(torch.zeros_like(seed), seed & mask)
    state = mixed(state, (seed >> 32) & mask)
    state = mixed(state, positions.to(torch.int64) & mask)[:, None]
    state = mixed(state, col_indices.to(torch.int64)[None, :] & mask) ^ 16  # bytes hashed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & mask
    return (state ^ (state >> 16)).to(torch.uint32)


# --- How they are replaced -----------------------------------------------------------------------


class _Patcher(MetaPathFinder):
    """Runs a patch once its module has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "sglang":
            _check_installed()
        if name not in _PATCHES:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _PatchingLoader(spec.loader.name, spec.loader.path)
        return spec


class _PatchingLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _PATCHES[module.__name__](module)


def _check_installed() -> None:
    """The version, and every module to be patched: one that is gone would never be imported."""
    if (found := version("sglang")) != _VERSION:
        raise RuntimeError(f"{__file__} is written for SGLang {_VERSION}, this is {found}")
    spec = PathFinder.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise RuntimeError("sglang has metadata, but is no package")
    root = Path(spec.origin).parents[1]
    for name in _PATCHES:
        if not root.joinpath(*name.split(".")).with_suffix(".py").is_file():
            raise RuntimeError(f"SGLang has no module {name} any more: change {__file__}")
    # transformers must not take our stub of torchvision for the real one; it asks once.
    from transformers.utils import is_torchvision_available

    is_torchvision_available()


# --- Packages that cannot be had -----------------------------------------------------------------

# sgl_kernel: CUDA only. torchvision: PyPI's is built against torch for CUDA; SGLang imports names
# of it for image models.
_STUBS = {"sgl_kernel", "torchvision"}


class _Stubs(MetaPathFinder, Loader):
    """Modules whose every name can be imported and none can be called."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in _STUBS or "sglang" not in sys.modules:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> "_Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}")


class _Missing:
    """A name of a stub; it and its attributes may be named, as defaults of arguments are."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "_Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"SGLang called {self._name}, which this environment does not have")
