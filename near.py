"""Near duplicates: recipes that are an earlier one with other words here and there.

Two recipes are as alike as their sets of shingles (runs of three words): shared ones ÷ all of both, the Jaccard index.
To compare each recipe with every earlier one would take days, so MinHash with banding (Broder 1997) names candidates:

    shingles  of each of 32 hash functions the smallest value over the set is kept. Two sets that share 0.8 have
              an equal minimum with a chance of 0.8.
    bands     8 groups of 4 minima. Two such sets have equal minima in a whole band with a chance of 0.8 ** 4 = 0.41,
              and in at least one of the 8 with 1 - 0.59 ** 8 = 0.985.

A table knows which recipe had a band last. Only that one is compared, from a file that holds everyone's shingles.
Up to 300 bytes a recipe stay in memory, most of them the table's.
"""

import os
import tempfile
import zlib
from array import array
from functools import lru_cache

import numpy as np

BANDS, MINIMA = 8, 4  # a band is this many minima
FIRST_SIZE = 2**12  # places of the table for each band, at first

# Odd factors, because x -> x * odd is one to one in 32 bits. The first ones serve as mixers, too.
random = np.random.default_rng(0).integers(0, 2**31, BANDS * MINIMA)
ODD = random.astype(np.uint32) * 2 + 1
FACTORS = ODD[:, None]  # (BANDS * MINIMA, 1)

# A table for str.translate, ten times as quick as a regex: of ASCII, all that is no letter or digit becomes a space.
SPACES = "".join(c if c.isalnum() else " " for c in map(chr, range(128)))


@lru_cache(2**16)
def word_hash(word):
    return zlib.crc32(word.encode())


def sketch(text):
    """(its shingles as bytes: sorted hashes of four bytes, its bands); None where there are no three words."""
    words = text.casefold().translate(SPACES).split()
    hashes = np.fromiter(map(word_hash, words), np.uint32, len(words))
    pairs = hashes[:-2] * ODD[0] ^ hashes[1:-1]
    shingles = pairs * ODD[1] ^ hashes[2:]
    shingles = np.sort(shingles * ODD[2])
    if not len(shingles):
        return None
    differs = shingles[1:] != shingles[:-1]  # from the one before
    shingles = shingles[np.append(True, differs)]
    return shingles.tobytes(), bands_of(shingles)


def bands_of(shingles):
    """The hash of each band of a set's minima, as a list."""
    minima = (shingles * FACTORS).min(1)
    mixed = minima.reshape(BANDS, MINIMA) * ODD[:MINIMA]
    return mixed.sum(1, dtype=np.uint32).tolist()


def jaccard(a, b):
    """How much two sets of shingles share, both as bytes."""
    a = np.frombuffer(a, np.uint32)
    b = np.frombuffer(b, np.uint32)
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


class Earlier:
    """The recipes that came before, numbered from 1 as they are remembered."""

    def __init__(self):
        # Unbuffered, because each recipe may be read back at once.
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it goes with this object)
        self.ends = array("Q", [0])  # where the shingles of recipe n end in the file
        self.bands = array("I")  # 8 of each recipe
        self.size = FIRST_SIZE
        # [band, its hash modulo size] -> the last recipe that had it; 0: none
        self.table = array("I", bytes(4 * BANDS * self.size))

    def find(self, shingles, bands, least):
        """How much an earlier recipe shares, if that is at least `least`; else 0, and this one is remembered."""
        places = [b * self.size + band % self.size for b, band in enumerate(bands)]
        for number in self.candidates(places, bands):
            same = jaccard(shingles, self.shingles_of(number))
            if same >= least:
                return same
        self.remember(shingles, bands, places)
        return 0

    def candidates(self, places, bands):
        """The recipes that had one of these bands last. A place is shared by many bands, so the band is looked at."""
        found = set()
        for b, place in enumerate(places):
            number = self.table[place]
            # 0: nobody had it.
            if number and self.bands[BANDS * (number - 1) + b] == bands[b]:
                found.add(number)
        return found

    def shingles_of(self, number):
        start = self.ends[number - 1]
        length = self.ends[number] - start
        return os.pread(self.file.fileno(), length, start)

    def remember(self, shingles, bands, places):
        number = len(self.ends)
        written = self.file.write(shingles)
        self.ends.append(self.ends[-1] + written)
        self.bands.extend(bands)
        for place in places:
            self.table[place] = number
        # A fuller table would forget too many.
        if 4 * number > self.size:
            self.grow()

    def grow(self):
        """A table of twice the size, filled again from the bands of all recipes."""
        count = len(self.ends) - 1
        self.size *= 2
        # The old table is let go first, so that the two are never in memory together.
        self.table = None
        table = np.zeros((BANDS, self.size), np.uint32)
        bands = np.array(self.bands).reshape(count, BANDS)
        numbers = np.arange(1, count + 1)
        table[range(BANDS), bands % self.size] = numbers[:, None]
        self.table = memoryview(table.reshape(-1))
