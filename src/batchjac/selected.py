"""Products of one recording with what an operator has: selected outputs, and all samples."""

from collections.abc import Sequence

from batchjac.block import Block
from batchjac.recording import Recording
from batchjac.seeds import seeds
from batchjac.space import Space, part

Blocks = Sequence[Block]


def pushed(recording: Recording, inputs: Space, columns: Blocks, samples: slice) -> list[Block]:
    """``A v`` on the selected outputs, for the part of the columns that these samples have."""
    into = [
        b if a.shared else part(b, samples) for a, b in zip(inputs.leaves, columns, strict=True)
    ]
    with recording.running():
        found = recording.push(into)
    return _selected(recording, found)


def pulled(recording: Recording, rows: Blocks, samples: slice) -> list[Block]:
    """``Aᵀ u`` for the part of the rows of the selected outputs that these samples have."""
    into = spread(recording, [part(b, samples) for b in rows])
    with recording.running():
        return recording.pull(into)


def spread(recording: Recording, rows: Blocks) -> list[Block]:
    """Rows of the selected outputs as rows of all of them, zero elsewhere."""
    found = []
    for job, block in zip(recording.work, rows, strict=True):
        chosen = seeds(job.y, recording.problem.outputs, "error", job.samples, job.path)
        shape = tuple(job.y.shape)
        if chosen.every:
            found.append(Block(block.data.reshape(*block.data.shape[:2], *shape[1:]), shape))
            continue
        index = chosen.each_sample.T
        data = block.data.flatten(2) if block.data.dim() > 2 else block.data.unsqueeze(2)
        n = max(data.shape[1], len(index))
        flat = data.new_zeros(block.rows, n, job.y[0].numel())
        flat.scatter_add_(2, index.expand(block.rows, n, -1), data.expand(-1, n, -1))
        found.append(Block(flat.reshape(block.rows, n, *shape[1:]), shape))
    return found


def _selected(recording: Recording, columns: Blocks) -> list[Block]:
    """Columns at the selected outputs."""
    found = []
    for job, block in zip(recording.work, columns, strict=True):
        chosen = seeds(job.y, recording.problem.outputs, "error", job.samples, job.path)
        data = block.full()
        if not chosen.every:
            flat = data.flatten(2) if data.dim() > 2 else data.unsqueeze(2)
            index = chosen.each_sample.T.expand(*flat.shape[:2], -1)
            data = flat.gather(2, index)
        data = data.reshape(*data.shape[:2], *chosen.shape)
        found.append(Block(data, tuple(data.shape[1:])))
    return found
