"""What the processor that this runs on can do.  Read at run time: the same kind of machine differs from day to day."""

import platform
import subprocess
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

DOT_PRODUCT_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "asimddp", "feat_dotprod"})
"""Four 8-bit products summed into 32 bits in one instruction: VNNI on x86, SDOT on Arm (Linux, macOS)."""

RELEVANT_FLAGS = frozenset(
    {
        *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8"),
        *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
        *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
        *("advsimd", "feat_dotprod", "feat_fp16", "feat_i8mm", "feat_bf16"),
    }
)
"""Those that decide which kernels a runtime picks, as Linux or macOS name them; a CPU has a hundred more."""


def relevant_flags() -> tuple[str, ...]:
    """Of this processor's, those that decide which kernels run, sorted: what tables of latencies are kept apart by."""
    return tuple(sorted(cpu_flags() & RELEVANT_FLAGS))


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this processor in lower case, as Linux or macOS name them; empty elsewhere."""
    match platform.system():
        case "Linux":
            return flags_of_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace"))
        case "Darwin":
            listing = subprocess.run(["sysctl", "hw.optional", "machdep.cpu"], capture_output=True, text=True)
            return flags_of_sysctl(listing.stdout)
        case _:
            return frozenset()


def flags_of_cpuinfo(text: str) -> frozenset[str]:
    """The flags that every processor of a /proc/cpuinfo has: a thread may land on any of them."""
    each = [
        frozenset(value.lower().split())
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")  # x86, Arm
    ]
    return frozenset.intersection(*each) if each else frozenset()


def flags_of_sysctl(text: str) -> frozenset[str]:
    """Flags from lines such as `hw.optional.arm.FEAT_DotProd: 1` and `machdep.cpu.features: FPU SSE4.2`."""
    flags: set[str] = set()
    for key, _, value in (line.partition(":") for line in text.splitlines()):
        if key.startswith("machdep.cpu.") and key.endswith("features"):
            flags.update(value.lower().split())
        elif key.startswith("hw.optional.") and value.strip() == "1":
            flags.add(key.rpartition(".")[2].lower())
    return frozenset(flags)


def stands_for(here: frozenset[str], wanted: frozenset[str]) -> bool:
    """Whether a processor with the flags `here` takes the times of one with `wanted`: it has them all, and no dot
    products that the other has not."""
    return wanted <= here and has_dot_product(wanted) == has_dot_product(here)


def has_dot_product(flags: frozenset[str]) -> bool:
    """Whether 8-bit products are summed in 32 bits at once; without, they may saturate in 16 bits on x86."""
    return not DOT_PRODUCT_FLAGS.isdisjoint(flags)
