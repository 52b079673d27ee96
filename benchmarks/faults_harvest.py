"""Faults of a harvest, made for real and counted; after each, the same command goes on and the bytes are compared.

    python benchmarks/faults_harvest.py                 everything; writes benchmarks/results/harvest_faults_...md
    python benchmarks/faults_harvest.py --moments 2     fewer kills, prints only

Jobs are `python -m pellucid harvest` on the embedded model, two workers under torchrun. Processes are ended with SIGKILL, by
their numbers. A run that is killed is started again with the same command in the same folder, and may be killed again;
whenever one comes to its end, every file is compared with an undisturbed run's and the folder is begun anew. Workers of a
killed launcher go on by themselves, so there each kill has a folder of its own: the same command is started at once, works
beside them and is let finish. The disk is full because it is: a tmpfs of its own where this may mount one (root), a limit on
the size of files otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import Report, machine_lines, table

from pellucid.demo import MODEL_FOLDER
from pellucid.errors import StoreError
from pellucid.scale.stored_activations import StoredActivations

HOOK = "blocks.2.hook_resid_post"
WORKERS = 2
ROOT = Path(__file__).parents[1]


@dataclass
class Count:
    """What happened to one kind of fault."""

    kind: str
    made: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


class Job:
    """A command, a folder, and what an undisturbed run makes."""

    def __init__(self, scratch: Path, repeats: int) -> None:
        self.scratch = scratch
        self.corpus = make_corpus(scratch, repeats)
        self.reference: dict[str, str] = {}
        self.seconds = 0.0

    def command(self, out: Path, workers: int = WORKERS, extra: Sequence[str] = ()) -> list[str]:
        files = [word for label, path in self.corpus.items() for word in ("--corpus", f"{label}={path}")]
        harvest = [
            "pellucid",
            "harvest",
            "demo",
            *files,
            "--hooks",
            HOOK,
            "--context",
            "64",
            "--batches-per-shard",
            "2",
        ]
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(workers), "--max-restarts", "0"]
        return [sys.executable, *(launch if workers > 1 else []), "-m", *harvest, "--out", str(out), *extra]

    def start(
        self, out: Path, workers: int = WORKERS, extra: Sequence[str] = (), stdout: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(random.randrange(10_000))}
        return subprocess.Popen(
            self.command(out, workers, extra),
            cwd=ROOT,
            env=environment,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, out: Path, workers: int = WORKERS, extra: Sequence[str] = ()) -> tuple[int, str]:
        process = self.start(out, workers, extra)
        output, _ = process.communicate()
        return process.returncode, output

    def make_reference(self) -> None:
        out = self.scratch / "reference"
        started = time.monotonic()
        code, output = self.run(out)
        self.seconds = time.monotonic() - started
        assert code == 0, output
        self.reference = contents(out)

    def is_whole(self, out: Path) -> bool:
        """Byte-identical to the undisturbed run, and every row once."""
        store = StoredActivations(out)
        store.verify()
        seen = torch.cat([batch.row for batch in store.batches(4096)])
        return contents(out) == self.reference and torch.equal(seen.sort().values, torch.arange(len(store)))


def make_corpus(scratch: Path, repeats: int) -> dict[str, Path]:
    """The embedded model's held-out text, said several times in other orders."""
    held_out = json.loads((MODEL_FOLDER / "held_out.json").read_text("utf-8"))
    order = random.Random(0)
    paths = {}
    for label, texts in held_out.items():
        lines = [text.replace("\n", " ") for text in texts["declaration"] + texts["sampled"]]
        said = [line for _ in range(repeats) for line in order.sample(lines, len(lines))]
        paths[label] = scratch / f"{label}.txt"
        paths[label].write_text("\n".join(said) + "\n", "utf-8")
    return paths


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# -- killing -----------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are alive."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def family(pid: int) -> list[int]:
    return [pid, *(other for child in children(pid) for other in family(child))]


def kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_worker(launcher: int) -> bool:
    workers = children(launcher)
    return bool(workers) and kill(random.choice(workers))


def kill_launcher(launcher: int) -> bool:
    return kill(launcher)


def kill_everything(launcher: int) -> bool:
    return sum(kill(pid) for pid in family(launcher)) > 0


KILLS: dict[str, Callable[[int], bool]] = {
    "kill -9 of a worker": kill_worker,
    "kill -9 of the launcher": kill_launcher,
    "kill -9 of the whole job": kill_everything,
}


def alive(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]


def case_kills(job: Job, kind: str, moments: int) -> tuple[Count, list[float]]:
    """Kill at random moments; see the page's head."""
    count, out, progress = Count(kind), job.scratch / "killed", []
    of_launcher = KILLS[kind] is kill_launcher
    shards = sum(name.endswith(".json") for name in job.reference) - 2
    orphans: list[int] = []
    killed_since = 0
    while count.made < moments or killed_since:
        kills = count.made < moments and not (of_launcher and killed_since)
        # Workers that outlive their launcher would write to a pipe that nobody reads any more.
        process = job.start(out, stdout=subprocess.DEVNULL if kills and of_launcher else subprocess.PIPE)
        if kills:
            wait_until = time.monotonic() + random.uniform(0, job.seconds)
            while time.monotonic() < wait_until and process.poll() is None:
                time.sleep(0.01)
            members = family(process.pid)
            if process.poll() is None and KILLS[kind](process.pid):
                count.made += 1
                killed_since += 1
                done = sum(path.suffix == ".json" and path.stem.isdecimal() for path in out.glob("*"))
                progress.append(done / shards)
                process.wait() if of_launcher else process.communicate()
                orphans = [pid for pid in members if pid != process.pid]
                continue  # workers of a killed launcher may still be at work beside the next ones
        output, _ = process.communicate()
        if process.returncode != 0:
            count.add("a resumed run failed")
            print(output[-2000:])
            break
        while alive(orphans):
            time.sleep(0.1)
        whole = job.is_whole(out)
        leftovers = [path.name for path in out.iterdir() if path.name.endswith(".part")]
        ended = "finished after kills" if killed_since else "finished before it could be killed"
        count.add(f"{ended}, {'identical' if whole and not leftovers else 'NOT identical'}")
        killed_since = 0
        shutil.rmtree(out)
    for pid in alive(orphans):
        kill(pid)
    shutil.rmtree(out, ignore_errors=True)
    return count, progress


# -- the rest ----------------------------------------------------------------------------------------------------------


def case_damage(job: Job, kind: str, times: int) -> Count:
    """Truncate a file or flip one of its bits: the reader has to name it, the job to mend it."""
    count, out = Count(kind), job.scratch / "damaged"
    shutil.copytree(job.scratch / "reference", out)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    for name in random.sample(files, times):
        path = out / name
        data = bytearray(path.read_bytes())
        if kind == "a shard truncated":
            data = data[: random.randrange(len(data))]
        else:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        count.made += 1
        try:
            StoredActivations(out).verify()
            count.add("NOT noticed")
        except StoreError as error:
            count.add("named by the reader" if name in str(error) else "noticed, NOT named")
    code, output = job.run(out, workers=1, extra=["--format", "json"])
    made = json.loads(output[output.index("{") :])["written"] if code == 0 else -1
    shards = len({name.partition(".")[0] for name, digest in contents(out).items() if digest})
    count.add(f"{made} of {shards - 2} shards made anew, {'identical' if job.is_whole(out) else 'NOT identical'}")
    shutil.rmtree(out)
    return count


def case_refused(job: Job, kind: str, change: Sequence[str], expected: str) -> Count:
    """Something else under a half-done job: refused by name, nothing touched, and the old job goes on."""
    count, out = Count(kind), job.scratch / "refused"
    shutil.copytree(job.scratch / "reference", out)
    (out / "manifest.json").unlink()
    for path in list(out.glob("*[02468].json")):
        path.unlink()
    before = contents(out)
    count.made += 1
    code, output = job.run(out, workers=1, extra=change)
    named = code == 2 and expected in " ".join(output.split())
    count.add(f"refused by name ({expected})" if named else f"NOT refused: {code} {output[-300:]}")
    count.add("folder untouched" if contents(out) == before else "folder NOT untouched")
    code, output = job.run(out)
    count.add("resumed, identical" if code == 0 and job.is_whole(out) else "NOT identical")
    shutil.rmtree(out)
    return count


def case_changed(job: Job, kind: str) -> Count:
    """The corpus' file, or the model's weights, changed under a half-done job."""
    count, out, count.made = Count(kind), job.scratch / "changed", 1
    shutil.copytree(job.scratch / "reference", out)
    for path in list(out.glob("*[02468].json")):
        path.unlink()
    before = contents(out)
    if kind.startswith("the corpus"):
        path = job.corpus["fr"]
        text = path.read_bytes()
        path.write_bytes(text.replace(b"a", b"b", 1))
        code, output = job.run(out, workers=1)
        path.write_bytes(text)
        expected = "corpus.sha256"
    else:
        folder = job.scratch / "model"
        shutil.copytree(MODEL_FOLDER, folder)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-2] ^= 1  # the least of one weight
        (folder / "model.safetensors").write_bytes(data)
        command = [str(folder) if word == "demo" else word for word in job.command(out, workers=1)]
        done = subprocess.run(
            [*command, "--dtype", "float32"], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        code, output, expected = done.returncode, done.stderr, "model.weights_sha256"
        shutil.rmtree(folder)
    count.add(f"refused by name ({expected})" if code == 2 and expected in output else f"NOT refused: {output[-500:]}")
    count.add("folder untouched" if contents(out) == before else "folder NOT untouched")
    code, output = job.run(out)
    count.add("resumed, identical" if code == 0 and job.is_whole(out) else "NOT identical")
    shutil.rmtree(out)
    return count


def case_twice(job: Job, times: int) -> Count:
    """The same command started two or three times at once."""
    count, out = Count("the same job started twice at once"), job.scratch / "twice"
    for index in range(times):
        processes = [job.start(out, workers=1 + index % 2) for _ in range(2 + index % 2)]
        codes = []
        for process in processes:
            process.communicate()
            codes.append(process.returncode)
        count.made += 1
        count.add("all ended well, identical" if not any(codes) and job.is_whole(out) else f"NOT: {codes}")
        shutil.rmtree(out)
    return count


def case_full_disk(job: Job, times: int) -> Count:
    """A disk that fills while the job writes, and one that is too small from the start."""
    size = sum(path.stat().st_size for path in (job.scratch / "reference").iterdir())
    mount = job.scratch / "disk"
    mount.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={2 * size}", "tmpfs", str(mount)], capture_output=True
    ).returncode  # fmt: skip
    count = Count("a full disk (tmpfs)" if mounted else "a full disk (RLIMIT_FSIZE)")
    try:
        for _ in range(times):
            out = mount / "out"
            count.made += 1
            if mounted:
                process = job.start(out, workers=1)
                while not list(out.glob("*.json"))[4:]:
                    time.sleep(0.005)
                fill(mount, keep=random.randrange(size // 8))
                output, _ = process.communicate()
                code = process.returncode
            else:
                code, output = limited(job, out, size)
            said = " ".join(output.split())
            clear = code == 2 and "No space for shard" in said and "needs" in said and "bytes" in said
            count.add("stopped with shard and bytes" if clear else f"NOT clear: {code} {said[-300:]}")
            parts = len(list(out.glob("*.part")))
            count.add("nothing half-written left" if not parts else f"{parts} parts left")
            kept = contents(out)
            same = all(job.reference.get(name) == digest for name, digest in kept.items())
            count.add("what was done is whole" if same else "NOT whole")
            (mount / "filler").unlink(missing_ok=True)
            code, _ = job.run(out)
            count.add("resumed, identical" if code == 0 and job.is_whole(out) else "NOT identical")
            shutil.rmtree(out)
        if mounted:
            fill(mount, keep=size // 2)
            code, output = job.run(mount / "out", workers=1)
            refused = code == 2 and "The shards that are missing need" in " ".join(output.split())
            count.add("too small from the start: refused before the first forward" if refused else "NOT refused")
    finally:
        if mounted:
            subprocess.run(["umount", str(mount)], check=True)
    return count


def fill(mount: Path, keep: int) -> None:
    """Write until no more than ``keep`` bytes are left; the job writes meanwhile and may take the last of them."""
    with open(mount / "filler", "wb", buffering=0) as file:
        while (free := shutil.disk_usage(mount).free) > keep:
            try:
                file.write(b"\0" * min(2**20, free - keep))
            except OSError:
                return


def limited(job: Job, out: Path, size: int) -> tuple[int, str]:
    largest = max(path.stat().st_size for path in (job.scratch / "reference").glob("*.safetensors"))
    job.run(out, workers=1, extra=["--worker", "0/3"])
    done = subprocess.run(
        job.command(out, workers=1), cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2)),
    )  # fmt: skip
    return done.returncode, done.stderr


CASES = ("kills", "damage", "disk", "twice", "others")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="kills of each kind")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=4, help="of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hardware", default="cpu", help="part of the result file's name")
    parser.add_argument("--out", type=Path, help="the result file")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    report = Report("Faults of a harvest")
    for line in machine_lines():
        report.say(line)
    few = max(1, arguments.moments // 4)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), arguments.repeats)
        job.make_reference()
        store = StoredActivations(job.scratch / "reference")
        report.say(
            f"\n{len(store):,} rows of {HOOK} in {store.n_shards} shards of the embedded model, {WORKERS} workers under "
            f"torchrun; an undisturbed run takes {job.seconds:.0f} s. Seed {arguments.seed}.\n"
        )
        rows = []

        def tell(count: Count, note: str = "") -> None:
            outcomes = "; ".join(f"{number} x {what}" for what, number in count.outcomes.items())
            rows.append((count.kind, str(count.made), outcomes, note))
            print(rows[-1], flush=True)

        for kind in KILLS if "kills" in arguments.cases else ():
            count, progress = case_kills(job, kind, arguments.moments)
            inside = sum(0 < part < 1 for part in progress)
            tell(
                count,
                f"{inside} with some shards done and some not (median {sorted(progress)[len(progress) // 2]:.0%})",
            )
        for kind in ("a shard truncated", "a bit flipped") if "damage" in arguments.cases else ():
            tell(case_damage(job, kind, arguments.moments))
        if "disk" in arguments.cases:
            tell(case_full_disk(job, few))
        if "twice" in arguments.cases:
            tell(case_twice(job, few))
        settings = (
            ("other settings: threads", ["--threads", "2"], "run.threads 1 (asked for: 2)"),
            ("other settings: batch size", ["--batch-size", "4"], "run.batch_size 8 (asked for: 4)"),
            ("other settings: stored dtype", ["--store-dtype", "bfloat16"], "hooks"),
        )
        for what, change, expected in settings if "others" in arguments.cases else ():
            tell(case_refused(job, what, change, expected))
        changes = ("the corpus changed under a half-done job", "the model changed under a half-done job")
        for kind in changes if "others" in arguments.cases else ():
            tell(case_changed(job, kind))
    report.say(table(("fault", "made", "what happened", ""), rows))
    wrong = [row for row in rows if "NOT" in row[2] or "failed" in row[2]]
    report.say(f"\n{len(rows) - len(wrong)} of {len(rows)} kinds of fault ended as promised.")
    out = arguments.out
    if out is None and arguments.moments >= 20:
        out = Path(__file__).parent / "results" / f"harvest_faults_{arguments.hardware}_{time.strftime('%Y%m')}.md"
    if out is not None:
        report.write(out)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
