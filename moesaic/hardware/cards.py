"""NVIDIA's graphics cards for inference, with the figures of their data sheets.

Memory is what the driver reports, in MiB. Bandwidth is in GB/s. Arithmetic is for dense matrices, without sparsity, in
10^12 operations per second: bfloat16 (on cards before Ampere float16) with float32 sums, and 8-bit integers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A kind of graphics card.

    Attributes:
        name: name with the memory as it is sold.
        mebibytes: memory that the driver reports, in MiB.
        read_gb_s: memory bandwidth, in GB/s.
        bf16_top_s: 10^12 operations per second on bfloat16 numbers, float16 before Ampere.
        int8_top_s: 10^12 operations per second on bytes; 0 if the card has no such instructions.
        link_gb_s: bandwidth to other cards in each direction, in GB/s: NVLink, or else PCIe.
        aliases: other names.
    """

    name: str
    mebibytes: int
    read_gb_s: float
    bf16_top_s: float
    int8_top_s: float
    link_gb_s: float
    aliases: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the driver reports."""
        return self.mebibytes << 20

    @property
    def fast_link(self) -> bool:
        """Whether the cards are connected by NVLink."""
        return self.link_gb_s > 100


CARDS = (
    Card("B200-180GB", 183359, 8000, 2250, 4500, 900, ("B200", "B200-192GB")),
    Card("H200-141GB", 143771, 4800, 989, 1979, 450, ("H200",)),
    Card("H100-80GB", 81559, 3350, 989, 1979, 450, ("H100", "H100 SXM")),
    Card("H100-PCIe-80GB", 81559, 2000, 756, 1513, 64, ("H100 PCIe",)),
    Card("A100-80GB", 81920, 2039, 312, 624, 300, ("A100", "A180")),
    Card("A100-40GB", 40960, 1555, 312, 624, 300),
    Card("L40S-48GB", 46068, 864, 362, 733, 32, ("L40S",)),
    Card("RTX-6000-Ada-48GB", 49140, 960, 364, 728, 32, ("RTX 6000 Ada", "6000 Ada", "6000Ada")),
    Card("RTX-PRO-6000-96GB", 97887, 1792, 504, 1007, 64, ("RTX PRO 6000", "PRO 6000")),
    Card("RTX-A6000-48GB", 49140, 768, 155, 310, 56, ("A6000", "RTX A6000")),
    Card("A40-48GB", 46068, 696, 150, 299, 56, ("A40",)),
    Card("RTX-A5000-24GB", 24564, 768, 111, 222, 56, ("A5000", "RTX A5000")),
    Card("RTX-5090-32GB", 32607, 1792, 210, 838, 64, ("RTX 5090", "5090")),
    Card("RTX-4090-24GB", 24564, 1008, 165, 661, 32, ("RTX 4090", "4090")),
    Card("RTX-3090-24GB", 24576, 936, 71, 284, 56, ("RTX 3090", "3090")),
    Card("A30-24GB", 24576, 933, 165, 330, 100, ("A30",)),
    Card("A10-24GB", 23028, 600, 125, 250, 32, ("A10", "A10G")),
    Card("L4-24GB", 23034, 300, 121, 242, 32, ("L4",)),
    Card("V100-32GB", 32768, 900, 125, 0, 150, ("V100",)),
    Card("T4-16GB", 15360, 320, 65, 130, 16, ("T4",)),
)
"""The known cards, data-centre cards of recent years first."""
