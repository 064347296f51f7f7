"""What agreement is measured on, read from the evaluation's files."""

from distill.errors import DataError
from distill.evals.agreement import TeacherTrace
from distill.evals.results import load_result
from distill.logit_cache import CacheReader
from distill.records import CaptureSpec
from distill.store import StageFolder


def teacher_traces(folder: StageFolder, teacher: str, limit: int | None = None) -> list[TeacherTrace]:
    """Sample 0 of the first `limit` evaluation prompts, with the distributions captured while it was drawn."""
    shards = [s for s in folder.shards() if s.name.endswith(".cache") and s.info.get("name") == teacher]
    readers = [CacheReader(folder.check_shard(shard.name).path) for shard in shards]
    reader_of = {key: reader for reader in readers for key in reader.keys()}  # noqa: SIM118 (a reader is no dict)
    traces = []
    for row in load_result(folder, teacher).rows[:limit]:
        key, ids = f"{row['prompt_key']}/0", row["completion_ids"][0]
        if key not in reader_of:
            raise DataError(
                "no distributions were captured for this sample",
                where=str(folder.path),
                value=key,
                remedy="Pass --restart eval.",
            )
        header = reader_of[key].header
        capture = CaptureSpec(header.k_max, header.tail_bound, header.tail_draws)
        traces.append(TeacherTrace(key, row["problem"], ids, reader_of[key][key], capture))
    return [trace for trace in traces if trace.completion_ids]
