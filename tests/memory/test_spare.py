"""What a run does by itself with memory that is left over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minilora.memory.job import MemoryJob
from minilora.memory.peak import GIB, peak_memory
from minilora.memory.spare import Open, use_spare_memory
from minilora.settings.command_line import read_settings
from tests.support.article import FILES, article


def decided(job: MemoryJob, gib: float, *, blocks: bool = True, tiles: bool = True) -> MemoryJob:
    return use_spare_memory(job, int(gib * GIB), Open(blocks, tiles))


def test_blocks_save_their_activations_while_they_fit() -> None:
    """One token has 130 KB of activations in a block, so a step of 32,768 tokens 4.3 GB."""
    for gib, expected in ((4, 0), (16, 0), (24, 1), (48, 6), (200, 32)):
        limit = gib * GIB
        chosen = decided(article(), gib, tiles=False)
        assert (chosen.keep_blocks, chosen.gather_tokens) == (expected, None)
        assert peak_memory(chosen).total <= 0.85 * limit or expected == 0
        more = replace(chosen, keep_blocks=min(expected + 1, 32))
        assert peak_memory(more).total > 0.85 * limit or expected == 32
    assert decided(article(rank=8, step_tokens=2048), 24).keep_blocks == 32


def test_half_of_a_machines_memory_is_left_to_others() -> None:
    host = article(on_gpu=False)
    keep = decided(host, 48).keep_blocks
    assert keep
    needed = [peak_memory(replace(host, keep_blocks=n)).total for n in (keep, keep + 1)]
    assert needed[0] <= 24 * GIB < needed[1]


def test_where_nothing_is_gathered_the_step_is_cut_so_that_more_blocks_save() -> None:
    alone = article(ranks=1)
    chosen = decided(alone, 80, tiles=False)
    assert (chosen.keep_blocks, chosen.gather_tokens) == (32, 2048)
    assert peak_memory(replace(alone, keep_blocks=14)).total > 80 * GIB
    assert decided(article(zero=FILES["zero2"]), 80, tiles=False).gather_tokens == 2048
    given = decided(replace(alone, gather_tokens=32768), 80)
    assert given.gather_tokens == 32768 and 0 < given.keep_blocks < 14


@pytest.mark.parametrize(
    ("file", "gib", "tile", "keep"),
    [
        ("zero0", 80, 8192, 32), ("zero2", 80, 8192, 32), ("zero2", 48, 4096, 32),
        ("zero0", 23.64, 2048, 7), ("zero2", 23.64, 2048, 9),
    ],
)  # fmt: skip
def test_a_gpu_takes_the_largest_tiles_that_cost_few_blocks(
    file: str, gib: float, tile: int, keep: int
) -> None:
    """8 B: on 80 GB all blocks save their activations in tiles of 8,192 tokens too."""
    chosen = decided(article(zero=FILES[file]), gib)
    assert (chosen.tile_tokens, chosen.gather_tokens, chosen.keep_blocks) == (tile, tile, keep)
    assert peak_memory(chosen).total <= 0.85 * gib * GIB
    doublings = {2048: 0, 4096: 1, 8192: 2}
    for other in doublings:
        spans = replace(chosen, tile_tokens=other, gather_tokens=other, keep_blocks=0)
        if peak_memory(spans).total <= 0.85 * gib * GIB:
            kept = decided(spans, gib, tiles=False).keep_blocks
            assert kept + 2 * doublings[other] <= keep + 2 * doublings[tile]


def test_where_weights_are_gathered_tiles_grow_and_the_step_stays_whole() -> None:
    chosen = decided(article(), 80)
    assert (chosen.tile_tokens, chosen.gather_tokens) == (8192, None)


def test_tiles_stay_within_what_was_asked() -> None:
    """Within gather_tokens, and as they are where a step is no longer, or on a CPU."""
    assert decided(article(gather_tokens=4096), 80).tile_tokens == 4096
    assert decided(article(step_tokens=2048), 80).tile_tokens == 2048
    assert decided(article(on_gpu=False), 200).tile_tokens == 2048
    assert decided(article(tile_tokens=512), 80, tiles=False).tile_tokens == 512


def test_how_many_blocks_were_asked_for_stays() -> None:
    chosen = decided(article(ranks=1, keep_blocks=3), 80, blocks=False)
    assert (chosen.keep_blocks, chosen.gather_tokens, chosen.tile_tokens) == (3, None, 8192)


def test_nothing_changes_where_nothing_fits() -> None:
    assert decided(article(), 4) == article()


def test_what_the_settings_leave_open() -> None:
    def left(*words: str) -> Open:
        required = ["--model_name_or_path", "m", "--output_dir", "o", "--dataset", "d"]
        return Open.of(read_settings([*required, *words], "train"))

    assert left() == Open(blocks=True, tiles=True)
    assert left("--keep_blocks", "0") == Open(blocks=False, tiles=True)
    assert left("--tile_tokens", "2048") == Open(blocks=True, tiles=False)
    assert left("--disable_gradient_checkpointing", "true") == Open(blocks=False, tiles=True)
