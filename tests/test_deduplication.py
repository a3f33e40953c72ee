"""Near-duplicates: those that an exhaustive comparison finds, in any script, and forms of which there are many."""

import re
from itertools import combinations

import numpy as np
import pytest

from data import deduplication
from data.deduplication import join_groups, near_duplicates

WORDS = np.array([f"word{number}" for number in range(2000)])


def clusters(texts, pairs):
    """The groups of two texts and more."""
    groups = {}
    for index, group in enumerate(join_groups([""] * len(texts), pairs)):
        groups.setdefault(group, []).append(index)
    return sorted(members for members in groups.values() if len(members) > 1)


def similarity(left, right, units=r"\w+"):
    sets = []
    for text in (left, right):
        words = re.findall(units, text.casefold())
        sets.append(set(zip(*(words[start:] for start in range(5)), strict=False)))
    return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))


def altered(text, rng, num_words):
    words = text.split()
    for place in rng.choice(len(words), num_words, replace=False):
        words[place] = "another"
    return " ".join(words)


@pytest.fixture(scope="module")
def corpus():
    """60 texts of 50 to 300 words, 60 that are alterations of them, and boilerplate in every third."""
    rng = np.random.default_rng(0)
    originals = [" ".join(rng.choice(WORDS, rng.integers(50, 300))) for _ in range(60)]
    boilerplate = " ".join(rng.choice(WORDS, 40))
    originals = [f"{boilerplate} {text}" if i % 3 == 0 else text for i, text in enumerate(originals)]
    copies = [altered(originals[rng.integers(60)], rng, rng.integers(0, 12)) for _ in range(60)]
    return [(originals + copies)[place] for place in rng.permutation(120)]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_what_comparing_every_pair_finds_is_found(corpus, threshold):
    alike = [(i, j) for i, j in combinations(range(120), 2) if similarity(corpus[i], corpus[j]) >= threshold]
    pairs = near_duplicates(iter(corpus), threshold)
    assert clusters(corpus, pairs) == clusters(corpus, alike)
    assert all(i < j for i, j in pairs)
    assert len(pairs) == sum(len(members) - 1 for members in clusters(corpus, alike))


@pytest.mark.parametrize(
    ("text", "edited", "other"),
    [
        (
            "从前有一位老人住在海边的小屋里，他每天早上都去钓鱼，晚上回家给孙子讲故事。村里的人都很喜欢他，常常带水果来看他。",
            "从前有一位老人住在海边的小屋里 他每天早上都去钓鱼 晚上回家给孙女讲故事 村里的人都很喜欢他 常常带水果来看他",
            "春天来了，公园里的花都开了，孩子们在草地上放风筝，大人们坐在树下喝茶聊天，大家都觉得这样的日子真好。",
        ),
        (
            "むかしむかし、あるところにおじいさんとおばあさんが住んでいました。おじいさんは山へ柴刈りに、おばあさんは川へ洗濯に行きました。",
            "むかしむかし、あるところにおじいさんとおばあさんが住んでいました。おじいさんは山へ柴刈りに、おばあさんは川へ洗濯に行った。",
            "きのうは雨がふっていたので、わたしは家で本を読んでいました。夕方になって雨がやんだから、犬といっしょに散歩に出かけました。",
        ),
        (
            "กาลครั้งหนึ่งนานมาแล้วมีชายชราคนหนึ่งอาศัยอยู่ริมทะเลเขาออกไปจับปลาทุกเช้าและเล่านิทานให้หลานฟังทุกคืนก่อนนอน",
            "กาลครั้งหนึ่งนานมาแล้วมีชายชราคนหนึ่งอาศัยอยู่ริมทะเลเขาออกไปจับปลาทุกเช้าและเล่านิทานให้หลานฟังทุกคืน",
            "เมื่อวานนี้ฝนตกหนักมากฉันจึงอยู่บ้านอ่านหนังสือทั้งวันพอตกเย็นฝนหยุดแล้วฉันก็พาสุนัขไปเดินเล่นที่สวนสาธารณะ",
        ),
    ],
    ids=["Chinese", "Japanese", "Thai"],
)
def test_texts_without_spaces(text, edited, other):
    assert near_duplicates([text, other, edited]) == [(0, 2)]
    assert near_duplicates([text, other, text.replace("，", "\n").replace("。", "")], threshold=1.0) == [(0, 2)]


def test_scripts_may_be_mixed(corpus):
    chinese = "他每天早上都去钓鱼晚上回家给孙子讲故事村里的人都很喜欢他"
    assert near_duplicates([f"{corpus[0]} {chinese}", corpus[1], f"{corpus[0]}{chinese}!"]) == [(0, 2)]


def test_texts_without_five_words_are_alike_only_if_equal():
    assert near_duplicates(["", "One two three", " \n", "!!!", "one, TWO: three?", "one two", "?", "!!!"]) == [
        (0, 2),
        (1, 4),
        (3, 7),
    ]


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_a_threshold_that_cannot_be_is_an_error(threshold):
    with pytest.raises(ValueError, match=f"above 0 and at most 1, got {threshold}"):
        near_duplicates(["a text"], threshold)


def test_forms_are_joined_by_kind_without_comparing_every_pair():
    rng = np.random.default_rng(1)
    forms = [" ".join(rng.choice(WORDS, 60)) for _ in range(3)]
    texts = [f"{forms[number % 3]} {number}" for number in range(20_000)]
    pairs = near_duplicates(texts)
    assert len(pairs) == 19_997
    assert join_groups([""] * len(texts), pairs) == [number % 3 for number in range(20_000)]


def test_boilerplate_does_not_make_near_duplicates():
    rng = np.random.default_rng(2)
    boilerplate = " ".join(rng.choice(WORDS, 80))
    texts = [f"{boilerplate} " + " ".join(rng.choice(WORDS, 120)) for _ in range(500)]
    assert near_duplicates([*texts, altered(texts[7], rng, 3)]) == [(7, 500)]


def test_a_sample_of_the_shingles_and_pieces_of_a_text_are_enough(corpus, monkeypatch):
    rng = np.random.default_rng(3)
    long = " ".join(rng.choice(WORDS, 3000))
    texts = [*corpus[:20], long, altered(long, rng, 20), long.replace(" ", "\n\n")]
    expected = clusters(texts, near_duplicates(texts))
    assert [20, 21, 22] in expected
    monkeypatch.setattr(deduplication, "MAX_SHINGLES", 2000)
    monkeypatch.setattr(deduplication, "MAX_CHARACTERS", 2000)
    assert [20, 21, 22] in clusters(texts, near_duplicates(texts))
