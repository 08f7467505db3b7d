"""What the policy wrote: some responses of every step in samples.jsonl, for people to read.

Rows have the keys step, uid, prompt, answer, response, value, parts, reason, error, length,
finish_reason and versions ([version, start, end] over response tokens).
"""

from typing import Any

from r1mega.records import Group, Prompt, Sample, Score
from r1mega.run.directory import RunDirectory
from r1mega.run.rows import append_rows, iterate_rows, truncate_after


def write_samples(directory: RunDirectory, step: int, groups: list[Group], rows: int) -> None:
    """Append ``rows`` samples of ``step``: the first of every group, then the second, ..."""
    triples = [
        (group.prompt, sample, score)
        for group in groups
        for sample, score in zip(group.samples, group.scores, strict=True)
    ]
    triples.sort(key=lambda triple: triple[1].index)  # stable: groups keep their order
    append_rows(directory.samples, [_row(step, *triple) for triple in triples[:rows]])


def first_and_last(directory: RunDirectory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the first and of the last step, in one pass: the file of a long run is large."""
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    for row in iterate_rows(directory.samples):
        if not first or row["step"] == first[0]["step"]:
            first.append(row)
        if last and row["step"] != last[0]["step"]:
            last = []
        last.append(row)
    return first, last


def truncate_samples_after(directory: RunDirectory, step: int) -> None:
    """Forget the samples of later steps, which a resumed run draws again."""
    truncate_after(directory.samples, step)


def _row(step: int, prompt: Prompt, sample: Sample, score: Score) -> dict[str, Any]:
    return {
        "step": step,
        "uid": sample.uid,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "response": sample.text,
        "value": score.value,
        "parts": score.parts,
        "reason": score.reason,
        "error": score.error,
        "length": len(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "versions": [[span.version, span.start, span.end] for span in sample.versions],
    }
