"""Blocks: counted, found again by their content, handed out least recently used first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.engine.block_manager import BlockManager

SIZE = 4


def hashes(manager: BlockManager, tokens: list[int], salt: str | None = None) -> list[bytes]:
    """Names of the full blocks of `tokens` that have the lookahead behind them."""
    names, previous = [], manager.first_hash(salt)
    for block in range((len(tokens) - manager.lookahead) // manager.block_size):
        previous = manager.next_hash(previous, tokens, block)
        names.append(previous)
    return names


def store(manager: BlockManager, tokens: list[int], salt: str | None = None) -> list[int]:
    """Blocks that hold `tokens`, named, still referenced."""
    blocks = manager.allocate(manager.blocks_for(len(tokens)))
    assert blocks is not None
    for block, name in zip(blocks, hashes(manager, tokens, salt), strict=False):
        manager.register(block, name)
    return blocks


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for_a_number_of_tokens(tokens, blocks):
    assert BlockManager(8, SIZE).blocks_for(tokens) == blocks


def test_all_or_nothing():
    manager = BlockManager(4, SIZE)
    first = manager.allocate(3)
    assert sorted(first) == sorted(set(first)) and manager.num_free == 1
    assert manager.allocate(2) is None
    assert manager.num_free == 1  # a refusal takes nothing
    manager.check([first])
    assert manager.allocate(0) == []
    manager.free(first)
    assert manager.num_free == 4
    manager.check([])


def test_a_block_freed_twice_is_our_own_mistake():
    manager = BlockManager(2, SIZE)
    blocks = manager.allocate(1)
    manager.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(blocks)


def test_check_names_what_is_wrong():
    manager = BlockManager(3, SIZE)
    blocks = manager.allocate(2)
    with pytest.raises(AssertionError, match="reference counts"):
        manager.check([blocks[:1]])
    manager.check([blocks])


def test_a_prefix_is_found_while_it_is_held_and_after():
    manager = BlockManager(8, SIZE)
    tokens = list(range(10))
    held = store(manager, tokens)
    found, names = manager.find_prefix([*tokens, 77], None)
    assert found == held[:2] and names == hashes(manager, tokens)
    manager.check([held, found])
    manager.free(held)
    manager.free(found)
    manager.check([])
    again, _ = manager.find_prefix(tokens, None)
    assert again == held[:2] and manager.num_free == 6  # free blocks keep their content


def test_one_token_is_left_to_compute():
    manager = BlockManager(8, SIZE)
    tokens = list(range(8))
    held = store(manager, tokens)
    assert manager.find_prefix(tokens, None)[0] == held[:1]
    assert manager.find_prefix([*tokens, 1], None)[0] == held[:2]
    assert manager.find_prefix(tokens[:4], None)[0] == []


def test_a_prefix_ends_at_the_first_difference():
    manager = BlockManager(8, SIZE)
    held = store(manager, list(range(12)))
    other = [*range(4), 99, *range(5, 13)]  # the third block's own tokens are equal, what lies before them is not
    assert manager.find_prefix(other, None)[0] == held[:1]
    assert manager.find_prefix([99, *range(1, 13)], None)[0] == []


def test_a_salt_keeps_prefixes_apart():
    manager = BlockManager(8, SIZE)
    tokens = list(range(9))
    one = store(manager, tokens, "one")
    for salt in (None, "two"):
        assert manager.find_prefix(tokens, salt)[0] == []
    assert manager.find_prefix(tokens, "one")[0] == one[:2]


def test_with_an_mtp_module_the_token_behind_a_block_counts():
    manager = BlockManager(8, SIZE, lookahead=1)
    held = store(manager, list(range(9)))
    assert manager.find_prefix([*range(8), 8, 9], None)[0] == held[:2]
    assert manager.find_prefix([*range(8), 77, 9], None)[0] == held[:1]


def test_without_reuse_nothing_is_found():
    manager = BlockManager(8, SIZE, enable_reuse=False)
    store(manager, list(range(9)))
    assert manager.find_prefix(list(range(9)), None) == ([], [])


def test_the_first_block_with_a_name_keeps_it():
    manager = BlockManager(8, SIZE)
    first, second = store(manager, list(range(5))), store(manager, list(range(5)))
    assert first[0] != second[0]
    manager.check([first, second])
    assert manager.find_prefix(list(range(5)), None)[0] == first[:1]
    manager.free(second)  # unnamed: nothing is lost
    manager.free(first)
    assert manager.find_prefix(list(range(5)), None)[0] == first[:1]


def test_blocks_without_content_go_first_then_the_least_recently_used():
    manager = BlockManager(6, SIZE)
    old, new = store(manager, list(range(8))), store(manager, list(range(50, 58)))
    rest = manager.allocate(2)
    manager.free(old)
    manager.free(new)
    manager.free(rest)
    assert sorted(manager.allocate(2)) == sorted(rest)  # they name nothing
    # The end of a prefix is of no use without its beginning, so it goes first.
    assert manager.allocate(1) == [old[1]]
    assert manager.find_prefix(list(range(9)), None)[0] == [old[0]]  # used again, so it is the last to go
    manager.free([old[0]])
    assert manager.allocate(3) == [new[1], new[0], old[0]]
    for tokens in (range(9), range(50, 59)):
        assert manager.find_prefix(list(tokens), None)[0] == []  # handed out: their content is gone


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_keeps_the_books(data):
    """Blocks are never in two hands unless found by their content, and a found block holds what its name says."""
    manager = BlockManager(data.draw(st.integers(1, 12)), 2, lookahead=data.draw(st.integers(0, 1)))
    holders: list[list[int]] = []
    content: dict[int, list[int]] = {}  # block -> all tokens up to its end, and the lookahead
    for _ in range(data.draw(st.integers(1, 40))):
        if holders and data.draw(st.booleans()):
            manager.free(holders.pop(data.draw(st.integers(0, len(holders) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
            found, names = manager.find_prefix(tokens, None)
            for index, block in enumerate(found):
                assert content[block] == tokens[: (index + 1) * 2 + manager.lookahead]
            fresh = manager.allocate(manager.blocks_for(len(tokens)) - len(found))
            if fresh is None:
                manager.free(found)
            else:
                assert not set(fresh) & {block for blocks in holders for block in blocks}
                for block in fresh:
                    content.pop(block, None)
                blocks = found + fresh
                for index, name in enumerate(hashes(manager, tokens)):
                    if index >= len(names):
                        manager.register(blocks[index], name)
                        content[blocks[index]] = tokens[: (index + 1) * 2 + manager.lookahead]
                holders.append(blocks)
        manager.check(holders)
