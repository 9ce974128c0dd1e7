"""How the kernels that quantise Q, K and V share out their work: the numbers of `quantizing_sheets.py`.

Convention and layout are those of `attngen.quantize`. A block of threads takes 128 rows of a head at a time; a thread
copies its share of the next rows to shared memory while it works on the ones before.
"""

from dataclasses import dataclass

from attngen.arch import RESERVED_SMEM_BYTES, Arch
from attngen.quantize import KEY_BLOCK, ScaleKind, signs

ROW_LANES = 4
"""Lanes that share a row of Q or K: together they write 32 bytes at a time, a whole sector."""
CHUNK = 8
"""Elements of 16 bits that one load moves."""
MOST_COPIES = 8
"""Of 16 bytes that a thread has under way: 64 elements."""
_BOOKKEEPING_REGISTERS = 48
"""Registers a thread has beside the elements it holds; registers are given out in eights."""


@dataclass(frozen=True)
class Quantizer:
    """Every number of the kernels that quantise for one attention kernel.

    Attributes:
        name: prefix of the kernels' names; that of the attention kernel they serve.
        head_dim_qk, head_dim_v: multiples of 16 up to 256; head_dim_qk is 64, 128 or 256 with a Hadamard matrix.
        scales: what shares a scale.
        hadamard_seed: of the signs of the matrix that Q and K are multiplied by; None for no matrix.
    """

    name: str
    arch: Arch
    head_dim_qk: int
    head_dim_v: int
    scales: ScaleKind
    hadamard_seed: int | None = None

    @property
    def finds_maxima(self) -> bool:
        """Whether a scale spans more than what a block of threads sees, so that a launch before finds the maxima."""
        return self.scales in ("per_tensor", "per_head")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return ROW_LANES * KEY_BLOCK // self.thread_rows

    @property
    def row_vectors(self) -> int:
        """Copies of 16 bytes by which a lane gets its part of a row of Q or K."""
        return -(-self.head_dim_qk // (CHUNK * ROW_LANES))

    @property
    def thread_rows(self) -> int:
        """Rows of Q or K of which a thread takes a part: a power of two, as many as its copies, of V too, allow."""
        most_warps = ROW_LANES * KEY_BLOCK // 32  # with a row a thread
        copies = max(self.row_vectors, -(-4 * _warp_copies(self.head_dim_v, CHUNK) // most_warps))
        return 1 << (MOST_COPIES // copies).bit_length() - 1

    @property
    def value_units(self) -> int:
        """How often a thread takes 16 bytes of four keys of V."""
        return -(-_warp_copies(self.head_dim_v, CHUNK) // (self.threads // 32))

    @property
    def packed_units(self) -> int:
        """How often it takes 16 bytes of four keys of V that is of 8 bits."""
        return -(-_warp_copies(self.head_dim_v, 2 * CHUNK) // (self.threads // 32))

    @property
    def staged(self) -> int:
        """Copies of 16 bytes that a thread has under way."""
        return max(self.thread_rows * self.row_vectors, 4 * self.value_units)

    @property
    def smem_bytes(self) -> int:
        """What is staged, and behind it a tile of packed V."""
        return 16 * self.staged * self.threads + self.head_dim_v * KEY_BLOCK

    @property
    def blocks_per_sm(self) -> int:
        """Blocks of threads that shall fit on one multiprocessor."""
        packed = 4 * self.staged
        held = packed if self.hadamard_seed is None else 2 * packed + 8  # butterflies are in f32
        registers = held + _BOOKKEEPING_REGISTERS
        return min(
            self.arch.registers_per_sm // (self.threads * registers),
            self.arch.smem_bytes_per_sm // (self.smem_bytes + RESERVED_SMEM_BYTES),
            self.arch.threads_per_sm // self.threads,
        )

    @property
    def persistent(self) -> bool:
        """Whether a block of threads takes part after part, the next one's copies under way.

        So it does where butterflies would leave the memory idle, or blocks that hide each other's copies are few;
        otherwise blocks of one part each are 3 to 10 % faster (H200, docs/performance.md).
        """
        return self.hadamard_seed is not None or self.blocks_per_sm < 3

    @property
    def sign_words(self) -> tuple[tuple[int, ...], ...]:
        """For each lane of a row the signs of its columns, 32 in a word.

        Bit 15 - p of word w is set where the lower element of its register 16 w + p changes sign, bit 31 - p where the
        upper one does. Lane l holds the chunks l, l + 4, l + 8 ... of a row, 4 registers each.
        """
        assert self.hadamard_seed is not None
        of_column = signs(self.hadamard_seed, self.head_dim_qk)
        lanes = []
        for lane in range(ROW_LANES):
            words = [0] * -(-self.row_vectors // 4)
            for register in range(4 * self.row_vectors):
                column = CHUNK * (lane + ROW_LANES * (register // 4)) + register % 4 * 2
                for half in range(2):
                    if of_column[column + half] < 0:
                        words[register // 16] |= 1 << 15 + 16 * half - register % 16
            lanes.append(tuple(words))
        return tuple(lanes)


def _warp_copies(head_dim_v: int, chunk: int) -> int:
    """How often a warp takes 16 bytes of four keys of V until it has 128 keys; `chunk` elements are 16 bytes.

    Eight lanes, or four where a key has no more chunks, take chunks of one key, the others of the warp other keys.
    """
    chunks = -(-head_dim_v // chunk)
    lanes = 8 if chunks > 4 else 4
    return -(-chunks // lanes) * lanes
