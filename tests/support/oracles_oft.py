"""OFT in float64, from its formula: W R^T with one rotation a block of a layer's inputs.

R of a skew-symmetric Q is (I - Q)(I + Q)^-1 (Qiu et al., arXiv 2306.07280), or, where no inverse is taken, the sum
(I + Q)(I + Q + ... + Q^m), which tends to (I + Q)(I - Q)^-1: the rotation the other way round. Q has the parameters of
a block above its diagonal, row by row.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def skew(entries: Matrix, size: int) -> Matrix:
    """Q [size, size] from its size * (size - 1) / 2 entries above the diagonal."""
    found, count = np.zeros((size, size)), 0
    for row in range(size):
        for column in range(row + 1, size):
            found[row, column], found[column, row] = entries[count], -entries[count]
            count += 1
    return found


def rotation(q: Matrix, last_power: int | None) -> Matrix:
    """R of one Q. last_power: m of the sum; None for the inverse."""
    one = np.eye(len(q))
    if last_power is None:
        return np.asarray((one - q) @ np.linalg.inv(one + q))
    powers = sum(np.linalg.matrix_power(q, power) for power in range(last_power + 1))
    return np.asarray((one + q) @ powers)


def rotated(weight: Matrix, parameters: Matrix, size: int, last_power: int | None) -> Matrix:
    """W' [out, in] with W' x = W (x R)^T for a row x. parameters: [blocks, size * (size - 1) / 2]."""
    changed = weight.copy()
    for block, entries in enumerate(parameters):
        part = slice(block * size, (block + 1) * size)
        changed[:, part] = weight[:, part] @ rotation(skew(entries, size), last_power).T
    return changed
