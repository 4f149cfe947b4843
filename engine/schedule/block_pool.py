"""The KV cache's blocks: who holds them, which contents they keep, and which is given away next. Pure.

Blocks are numbers; their memory belongs to the runner. A block is in exactly one of three places:

    held      one or more sequences refer to it
    reusable  nobody refers to it, its contents are known by hash: free, and found again until it is given away
    unused    nobody refers to it and its contents mean nothing

Free means unused or reusable. `allocate` takes unused blocks first, then the least recently freed reusable one.

A hash names the contents of a full block *and* of everything before it (each hash covers its predecessor's), so that
one equal hash means one equal prefix. It is a cryptographic hash, because an unlucky or chosen collision would answer
one user with another user's context. A sequence's first block follows on its *root*, which is made of its cache salt:
so sequences find each other's blocks only where they have the same salt, or none.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

HASH_BYTES = 16


def root_hash(cache_salt: str | None) -> bytes:
    """What a sequence's first block follows on; no block has such a name."""
    if cache_salt is None:
        return b""
    return hashlib.blake2b(cache_salt.encode(), digest_size=HASH_BYTES, person=b"cache salt").digest()


def block_hash(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of one full block after the block named `previous`, or after the sequence's root."""
    return hashlib.blake2b(previous + array("q", token_ids).tobytes(), digest_size=HASH_BYTES).digest()


def extend_hashes(
    hashes: list[bytes], token_ids: list[int], block_size: int, num_blocks: int, root: bytes = b""
) -> None:
    """Append what is missing of a sequence's first `num_blocks` block hashes; these blocks must be full."""
    for index in range(len(hashes), num_blocks):
        tokens = token_ids[index * block_size : (index + 1) * block_size]
        hashes.append(block_hash(hashes[-1] if hashes else root, tokens))


class BlockPool:
    """All blocks of one KV cache."""

    __slots__ = ("_cached", "_hashes", "_num_holders", "_reusable", "_unused", "block_size", "caches", "num_blocks")

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        assert num_blocks > 0 < block_size, f"no cache: {num_blocks} blocks of {block_size} tokens"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caches = enable_prefix_caching
        self._num_holders = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks  # by block
        self._cached: dict[bytes, int] = {}  # hash -> block; the inverse of _hashes
        self._unused = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()  # least recently freed first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those kept for the prefix cache included."""
        return len(self._unused) + len(self._reusable)

    @property
    def usage(self) -> float:
        """Held share of the blocks, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    @property
    def num_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return self.num_blocks * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix. Not held yet: pass them to `allocate` before anything else."""
        found = []
        for name in hashes:
            block = self._cached.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, num_new: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Hold `shared` (from `lookup`) and `num_new` blocks of unknown contents, in this order; None, and nothing
        is changed, when they are not to be had."""
        num_shared_free = sum(1 for block in shared if not self._num_holders[block])
        if num_new > self.num_free - num_shared_free:
            return None
        for block in shared:
            if not self._num_holders[block]:
                del self._reusable[block]
            self._num_holders[block] += 1
        return [*shared, *(self._take() for _ in range(num_new))]

    def _take(self) -> int:
        """One free block, its contents forgotten."""
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            name = self._hashes[block]
            assert name is not None, f"block {block} is reusable without a name"
            del self._cached[name]
            self._hashes[block] = None
        self._num_holders[block] = 1
        return block

    def cache(self, block: int, name: bytes) -> None:
        """Let a held, full and computed block be found by its hash. Of two blocks with equal contents the first
        stays known."""
        assert self._num_holders[block], f"block {block} is not held"
        if self.caches and name not in self._cached and self._hashes[block] is None:
            self._cached[name] = block
            self._hashes[block] = name

    def forget(self, blocks: Sequence[int]) -> None:
        """Let these held blocks be found no more: what they hold may be wrong."""
        for block in blocks:
            name, self._hashes[block] = self._hashes[block], None
            if name is not None:
                del self._cached[name]

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of one sequence's blocks. Its last is given away first: a prefix is of use without what follows it,
        never the other way round."""
        for block in reversed(blocks):
            assert self._num_holders[block], f"block {block} is freed twice"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._hashes[block] is None:
                self._unused.append(block)
            else:
                self._reusable[block] = None
