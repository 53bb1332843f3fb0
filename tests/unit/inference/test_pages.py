import random

import pytest

from inference.pages import PagePool, chained


def keys(tokens: list[int], size: int, salt: bytes = b"") -> list[bytes]:
    found: list[bytes] = []
    for start in range(0, len(tokens) - size + 1, size):
        found.append(chained(found[-1] if found else salt, tokens[start : start + size]))
    return found


def hold(pool: PagePool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Take and remember pages for a whole text."""
    pages: list[int] = []
    for key in keys(tokens, pool.page_tokens, salt):
        page = pool.take(pages[-1] if pages else None)
        assert page is not None
        pages.append(page)
        start = len(pages) * pool.page_tokens - pool.page_tokens
        pool.keep(page, key, chained(salt, tokens[start : start + pool.page_tokens]), start)
    return pages


def test_text_is_found_by_itself_wherever_it_stood_until_its_page_is_needed():
    pool = PagePool(4, 2)
    first = hold(pool, [1, 2, 3, 4], b"salt")
    assert pool.find(chained(b"salt", [3, 4])) == (first[1], 2)
    assert pool.find(chained(b"", [3, 4])) is None
    second = hold(pool, [9, 9, 3, 4], b"salt")
    assert pool.find(chained(b"salt", [3, 4])) == (second[1], 2)  # the newer one
    pool.release(first)
    pool.release(second)
    hold(pool, [7, 7, 8, 8])
    assert pool.find(chained(b"salt", [1, 2])) is None
    assert pool.find(chained(b"salt", [3, 4])) == (second[1], 2)
    hold(pool, [6, 6, 5, 5])
    assert pool.find(chained(b"salt", [3, 4])) is None
    assert pool.find(chained(b"", [8, 8])) is not None


def test_a_text_grows_side_by_side_while_others_do_too():
    pool = PagePool(64, 4)
    texts: list[list[int]] = [[] for _ in range(3)]
    for _ in range(8):
        for pages in texts:
            page = pool.take(pages[-1] if pages else None)
            assert page is not None
            pages.append(page)
    assert all(pages == list(range(pages[0], pages[0] + 8)) for pages in texts)


def test_released_pages_are_found_by_their_text_and_salt_alone():
    pool = PagePool(8, 2)
    pages = hold(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match([1, 2, 3, 4, 9, 9], b"") == pages[:2]
    pool.release(pages)
    assert (pool.used, pool.remembered) == (0, 3)
    assert pool.match([1, 2, 3, 4, 5, 6, 7], b"") == pages
    assert pool.match([1, 2, 3], b"") == pages[:1]
    assert pool.match([3, 4, 1, 2], b"") == []
    assert pool.match([1, 2, 3, 4], b"other") == []
    assert pool.available == 8


def test_room_is_made_by_forgetting_what_was_not_used_for_longest():
    pool = PagePool(4, 1)
    first, second = hold(pool, [1, 2]), hold(pool, [3, 4])
    pool.release(first)
    pool.release(second)
    pool.share(first[0])  # used again
    pool.release(first[:1])
    taken = [pool.take(None) for _ in range(3)]
    assert taken == [first[1], second[1], second[0]]  # the end of a text before its beginning
    assert pool.match([1], b"") == first[:1]
    assert pool.take(None) == first[0]
    assert pool.take(None) is None


def test_shared_pages_are_free_when_the_last_user_leaves():
    pool = PagePool(2, 1, remember=False)
    page = pool.take(None)
    assert page is not None
    pool.share(page)
    pool.release([page])
    assert pool.used == 1
    pool.release([page])
    assert pool.used == 0
    with pytest.raises(AssertionError, match="twice"):
        pool.release([page])


def test_random_histories_neither_lose_nor_double_pages():
    generator = random.Random(0)
    pool = PagePool(20, 2)
    users: list[list[int]] = []
    for _ in range(2000):
        if users and generator.random() < 0.5:
            pool.release(users.pop(generator.randrange(len(users))))
        else:
            tokens = [generator.randrange(2) for _ in range(generator.randrange(2, 12))]
            pages = pool.match(tokens, b"")
            for page in pages:
                pool.share(page)
            for key in keys(tokens, 2)[len(pages) :]:
                if (page := pool.take(pages[-1] if pages else None)) is None:
                    break
                pages.append(page)
                start = 2 * len(pages) - 2
                pool.keep(page, key, chained(b"", tokens[start : start + 2]), start)
            users.append(pages)
        held = [page for pages in users for page in pages]
        assert pool.used == len(set(held))
        assert pool.used + pool.available == 20
