"""Near duplicates: recipes that are an earlier recipe with other words here and there.

How alike two recipes are: cut both into shingles, which are runs of three words. The Jaccard index is the number of
shingles that both have, divided by the number that either has:

    stir the egg well now     stir-the-egg  the-egg-well  egg-well-now
    stir the egg well then    stir-the-egg  the-egg-well  egg-well-then      2 shared of 4: 0.5

Comparing each of 2 million recipes with every earlier one would be 2 * 10^12 comparisons. MinHash with banding (Broder
1997) finds the few earlier recipes that are worth comparing.

MinHash: a hash function puts all shingles into an order by chance. The smallest of the 4 shingles above may be any of
the 4. This shingle is the minimum of both sets only if both have it, as 2 of the 4 do. So two recipes have the same
minimum with a chance equal to their Jaccard index. Each recipe keeps its minima by 32 hash functions.

Banding: the 32 minima are 8 bands of 4. A recipe is compared with those that have all 4 minima of some band. Chances:

    Jaccard index       4 minima of one band        at least one of 8 bands
    0.8                 0.8 ** 4 = 0.41             1 - (1 - 0.41) ** 8 = 0.985
    0.3                 0.3 ** 4 = 0.008            1 - (1 - 0.008) ** 8 = 0.06

A table in memory has, for each band, the last recipe that had these 4 minima. The shingles of all recipes are in a
temporary file, from which a candidate is read and compared exactly. So no recipe is dropped that is less
alike than max_similar. A few near duplicates are missed, 1.5 % at an index of 0.8.
Proof: test_near_duplicates_are_those_of_a_slow_loop (tests/test_recipes.py).
Up to 300 bytes a recipe stay in memory, most of them in the table.
"""

import os
import tempfile
import zlib
from array import array
from functools import lru_cache

import numpy as np

# 8 bands of 4 minima each.
BANDS, MINIMA = 8, 4
# Places that the table has for each band, at first.
FIRST_SIZE = 2**12

# The 32 hash functions are x -> x * odd in 32 bits: an odd factor maps different x to different values.
# The first few factors also mix the words of a shingle and the minima of a band.
drawn = np.random.default_rng(0).integers(0, 2**31, BANDS * MINIMA)
ODD = drawn.astype(np.uint32) * 2 + 1
FACTORS = ODD[:, None]  # (BANDS * MINIMA, 1)

# For str.translate, because it is ten times as quick as a regex: ASCII characters but letters and digits become spaces.
SPACES = "".join(c if c.isalnum() else " " for c in map(chr, range(128)))


@lru_cache(2**16)
def word_hash(word):
    """32 bits of a word. Unlike Python's hash() the value is the same in every process."""
    return zlib.crc32(word.encode())


def sketch(text):
    """(the sorted hashes of a text's shingles, as bytes; their bands_of()). None for fewer than three words."""
    words = text.casefold().translate(SPACES).split()
    hashes = np.fromiter(map(word_hash, words), np.uint32, len(words))
    pairs = hashes[:-2] * ODD[0] ^ hashes[1:-1]
    shingles = pairs * ODD[1] ^ hashes[2:]
    shingles = np.sort(shingles * ODD[2])
    if not len(shingles):
        return None
    # Keep each hash once: the first, and each that differs from the one before.
    differs = shingles[1:] != shingles[:-1]
    shingles = shingles[np.append(True, differs)]
    return shingles.tobytes(), bands_of(shingles)


def bands_of(shingles):
    """shingles: an array of hashes. -> for each of the 8 bands one hash of its 4 minima"""
    minima = (shingles * FACTORS).min(1)
    mixed = minima.reshape(BANDS, MINIMA) * ODD[:MINIMA]
    return mixed.sum(1, dtype=np.uint32).tolist()


def jaccard(a, b):
    """The Jaccard index of two sets of shingles, both as bytes."""
    a = np.frombuffer(a, np.uint32)
    b = np.frombuffer(b, np.uint32)
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


class Earlier:
    """The recipes so far, numbered 1, 2, 3 … in the order in which they are remembered."""

    def __init__(self):
        # The shingles of all recipes, end to end. Unbuffered, because a recipe may be read right after it is written.
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it goes with this object)
        # Where the shingles of recipe 0 (there is none), 1, 2 … end in the file.
        self.offsets = array("Q", [0])
        # The 8 band hashes of each recipe.
        self.bands = array("I")
        # Places that the table has for each band.
        self.size = FIRST_SIZE
        # table[band * size + hash % size] is the last recipe whose hash of this band has this place; 0: no recipe.
        self.table = array("I", bytes(4 * BANDS * self.size))

    def find_or_remember(self, shingles, bands, least):
        """Jaccard index with an earlier recipe, if it is `least` or more. Else 0, and this recipe is remembered."""
        places = [b * self.size + band % self.size for b, band in enumerate(bands)]
        for number in self.candidates(places, bands):
            same = jaccard(shingles, self.shingles_of(number))
            if same >= least:
                return same
        self.remember(shingles, bands, places)
        return 0

    def candidates(self, places, bands):
        """The numbers of the recipes that stand in these places and have the same hash of that band.

        Compare the hashes, because different hashes share a place."""
        found = set()
        for b, place in enumerate(places):
            number = self.table[place]
            # 0: no recipe has had this place.
            if number and self.bands[BANDS * (number - 1) + b] == bands[b]:
                found.add(number)
        return found

    def shingles_of(self, number):
        """The shingles of a remembered recipe, as bytes."""
        start = self.offsets[number - 1]
        length = self.offsets[number] - start
        return os.pread(self.file.fileno(), length, start)

    def remember(self, shingles, bands, places):
        """Write the shingles to the file, and put the recipe's number into its places of the table."""
        number = len(self.offsets)
        written = self.file.write(shingles)
        self.offsets.append(self.offsets[-1] + written)
        self.bands.extend(bands)
        for place in places:
            self.table[place] = number
        # Grow at a quarter, because a recipe that takes an occupied place makes the table forget the one before it.
        if 4 * number > self.size:
            self.grow()

    def grow(self):
        """Make a table of twice the size from the bands of all recipes."""
        count = len(self.offsets) - 1
        self.size *= 2
        # Free the old table first, so that the two are never in memory together.
        self.table = None
        table = np.zeros((BANDS, self.size), np.uint32)
        bands = np.array(self.bands).reshape(count, BANDS)
        numbers = np.arange(1, count + 1)
        table[range(BANDS), bands % self.size] = numbers[:, None]
        self.table = memoryview(table.reshape(-1))
