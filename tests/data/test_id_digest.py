"""Digests of sets of sample_ids."""

import hashlib

import pytest

from unianom.data.id_digest import IdDigest


def digest(*ids):
    found = IdDigest()
    found.add(ids)
    return found


def test_it_is_the_sum_of_the_first_half_of_each_sha256():
    assert digest().hex() == "0" * 32
    assert digest("a/ö.png").hex() == hashlib.sha256("a/ö.png".encode()).hexdigest()[:32]
    halves = [int(hashlib.sha256(str(number).encode()).hexdigest()[:32], 16) for number in range(100)]
    assert digest(*map(str, range(100))).hex() == f"{sum(halves) % 2**128:032x}"
    assert sum(halves) > 2**128  # so the modulus was needed


def test_neither_the_order_nor_how_names_were_gathered_makes_a_difference():
    whole = digest("a", "b", "c").hex()
    assert digest("c", "a", "b").hex() == whole
    parts = digest("b")
    parts.merge(digest("c", "a"))
    assert parts.hex() == whole
    stored = IdDigest.from_hex(digest("a", "c").hex())
    stored.add(["b"])
    assert stored.hex() == whole


def test_a_name_lost_doubled_or_changed_is_noticed():
    whole = digest("a", "b").hex()
    assert len({whole, digest("a").hex(), digest("a", "b", "b").hex(), digest("a", "c").hex()}) == 4


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "g" * 32, "0x" + "0" * 30, "A" * 32])
def test_what_is_no_digest_is_refused(text):
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        IdDigest.from_hex(text)
