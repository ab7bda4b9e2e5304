"""Run the commands of README.md and of the cluster guide as they are written, and keep what they print.

    python -m scripts.walkthrough --out scripts/bench_results/walkthrough.txt

Each command is taken out of a code block of these files, so a guide that changes ends this with a sentence. Only names
of places are put in: HEAD, RUN, OUT, a directory for /shared. The cluster is a Ray of this machine with processes and
ports of its own. What needs GPUs, a cloud, Kubernetes, Slurm or Docker is listed as not run, with the reason.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.data.tokenizer import BpeTokenizer
from scripts.benchmarks.chaos_cluster import adopt_orphans, descendants
from tests.ray.conftest import Head, free_ports

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ("README.md", "cluster/README.md")
LIMIT_S = 1800.0  # for one command
WATCHED_S = 20.0
SHOWN = 40  # lines of a command's output, at most

NOT_RUN = {  # how a command begins -> why it is not run
    "bash scripts/test.sh": "the checks run it",
    "ray job submit --address http://HEAD:8265 --working-dir . -- python -m elastic_moe.train cluster": "GPUs",
    "ray up": "a cloud",
    "ray dashboard": "a cloud",
    "ray job submit --address http://localhost:8265": "a cloud",
    "ray down": "a cloud",
    "elastic-moe watch-notices": "a cloud; tests/ray/test_notices.py drains a node with it",
    "docker": "a Docker daemon",
    "kubectl": "Kubernetes",
    "sky ": "SkyPilot and a cloud",
    "sbatch": "Slurm; tests/ray/test_slurm.py runs the script",
    "ssh": "other machines",
    "ray metrics launch-prometheus": "a download; tests/ray/test_metrics.py runs Debian's Prometheus",
    "elastic-moe train model=medium": "hours on a processor",
    "elastic-moe status runs/c": "that run; see `elastic-moe status RUN`",
}


def commands(path: Path) -> Iterator[str]:
    """Commands of the shell in a guide's code blocks: comments are cut, continued lines joined."""
    for block in re.findall(r"^```\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
        joined = re.sub(r"\\\n\s*", "", block)
        for line in joined.splitlines():
            words = re.sub(r"\s+", " ", re.sub(r"\s#\s.*", "", line)).strip()
            if re.match(r"(bash|elastic-moe|ray|docker|kubectl|sky|sbatch|ssh) ", words):
                yield words


def reason(command: str) -> str:
    """Why a command is not run; "" if it is."""
    return next((why for begin, why in NOT_RUN.items() if command.startswith(begin)), "")


@dataclass
class Walk:
    """A directory to work in, a cluster, and the transcript.

    Args:
        root: empty directory.
        places: names that stand for a place -> the place.
        env: environment of the commands.
        out: file that takes the transcript.
    """

    root: Path
    places: dict[str, str]
    env: Mapping[str, str]
    out: Path

    def __post_init__(self) -> None:
        self.out.write_text("")

    def put_in(self, command: str) -> str:
        """The command with places for their names."""
        for name, place in self.places.items():
            before, after = (r"(?<![\w/-])", "") if name.endswith("/") else (r"(?<![\w-])", r"(?![\w-])")
            command = re.sub(f"{before}{re.escape(name)}{after}", place, command)
        return command

    def tell(self, text: str) -> None:
        with self.out.open("a") as transcript:
            print(text, file=transcript)
        print(text, flush=True)

    def run(self, command: str) -> int:
        """Run a command to its end, and keep its last lines."""
        self.tell(f"\n$ {command}")
        began_s = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", self.put_in(command)],
            cwd=ROOT,
            env=dict(self.env),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
        )
        lines = self.clean(done.stdout).splitlines()
        if len(lines) > SHOWN:
            lines = [*lines[: SHOWN // 2], f"... {len(lines) - SHOWN} lines ...", *lines[-SHOWN // 2 :]]
        self.tell("\n".join(lines))
        self.tell(f"[exit code {done.returncode}, {time.monotonic() - began_s:.0f} s]")
        return done.returncode

    def watch(self, command: str) -> int:
        """Run a command that shows a live view in a terminal, interrupt it after a while, and keep the last view."""
        self.tell(f"\n$ {command}\n[in a terminal of 100 columns; Ctrl-C after {WATCHED_S:.0f} s]")
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 100))
        words = ["bash", "-c", f"exec {self.put_in(command)}"]
        viewer = subprocess.Popen(words, cwd=ROOT, env=dict(self.env), stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen, deadline_s = b"", time.monotonic() + WATCHED_S
        while viewer.poll() is None and time.monotonic() < deadline_s:
            if select.select([ours], [], [], 0.5)[0]:
                seen += os.read(ours, 1 << 16)
        viewer.send_signal(signal.SIGINT)
        code = viewer.wait(60)
        os.close(ours)
        views = re.split(r"\x1b\[H\x1b\[2J", seen.decode(errors="replace"))
        self.tell(self.clean(max(views[-2:], key=len)).strip())
        self.tell(f"[exit code {code}]")
        return code

    def clean(self, text: str) -> str:
        """Without colours, and with names for this machine's places."""
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", text)
        for name, place in sorted(self.places.items(), key=lambda pair: -len(pair[1])):
            text = text.replace(place, name) if len(place) > 3 else text  # a rank's number stands everywhere
        return text.replace(str(self.root), "WORK").replace(str(ROOT), "CHECKOUT")


def walk(walk: Walk, head: Head, guides: Sequence[str], only: str) -> list[str]:
    """Go through the commands of these guides that contain `only`. Returns those that failed."""
    failed: list[str] = []
    submitted: subprocess.Popen[bytes] | None = None
    for guide in guides:
        walk.tell(f"===== {guide} =====")
        walk.places |= {"runs/": f"{walk.root}/{Path(guide).parent.name or 'first'}/runs/"}  # both have a runs/a
        for command in filter(lambda command: only in command, commands(ROOT / guide)):
            if why := reason(command):
                walk.tell(f"\n$ {command}\n[not run: it needs {why}]")
            elif command.startswith("elastic-moe status RUN"):
                head.start("--num-cpus=4", "--include-dashboard=true")
                submitted = submit(walk)
                failed += [] if walk.watch(command) in (0, 128 + signal.SIGINT, -signal.SIGINT) else [command]
            elif command.startswith("ray job submit"):
                walk.tell(f"\n$ {command}\n[it ran above: the commands of `elastic-moe ctl` were for it]")
            else:
                failed += [] if walk.run(command) == 0 else [command]
    if submitted is not None:
        code = submitted.wait(LIMIT_S)
        walk.tell(f"\n[the submitted job ended with exit code {code}; the end of what it printed:]")
        walk.tell("\n".join(walk.clean((walk.root / "job.log").read_text()).splitlines()[-SHOWN // 2 :]))
        failed += ["ray job submit"] if code else []
    return failed


def submit(walk: Walk) -> subprocess.Popen[bytes]:
    """Submit the guide's job, and wait until it trains."""
    (command,) = {c for c in commands(ROOT / GUIDES[1]) if c.startswith("ray job submit") and not reason(c)}
    walk.tell(f"\n$ {command} &\n[cluster.workers=2 elastic.max_workers=4 here, and steps without an end]")
    changed = walk.put_in(command).replace(
        "cluster.workers=8", "cluster.workers=2 elastic.max_workers=4 run.steps=1000000"
    )
    run_dir = Path(walk.places["RUN"])
    with (walk.root / "job.log").open("wb") as log:
        job = subprocess.Popen(["bash", "-c", changed], env=dict(walk.env), cwd=walk.root, stdout=log, stderr=log)
    deadline_s = time.monotonic() + LIMIT_S
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_bytes():
        if job.poll() is not None or time.monotonic() > deadline_s:
            raise TimeoutError(f"the job does not train:\n{(walk.root / 'job.log').read_text()}")
        time.sleep(1)
    return job


def places(root: Path, head: Head) -> dict[str, str]:
    """What the names in the guides stand for."""
    return {
        "HEAD:8265": head.dashboard.removeprefix("http://"),
        "/path/to/texts": str(ROOT / "elastic_moe"),
        "/shared": str(root / "shared"),
        "DIR": str(root / "hf"),
        "OUT": str(root / "exported"),
        "RUN": str(root / "shared" / "runs" / "first"),
        "WHO": "1",
    }


def make_model(path: Path) -> None:
    """A tiny random DeepSeek-V3 with a tokenizer, as its publisher would have it."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=1024, hidden_size=64, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=128,
        moe_intermediate_size=32, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_group=2,
        topk_group=1, num_experts_per_tok=2, n_shared_experts=1, q_lora_rank=None, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=2048, num_mtp_layers=0,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(path)
    texts = [file.read_text() for file in (ROOT / "elastic_moe" / "plan").rglob("*.py")]
    BpeTokenizer.train(texts, 1000).export(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.walkthrough", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file that takes the transcript")
    parser.add_argument("--guides", nargs="+", default=GUIDES, choices=GUIDES, help="which of them")
    parser.add_argument("--only", default="", help="only the commands that contain this")
    options = parser.parse_args(argv)
    adopt_orphans()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored, and its children
    root = Path(tempfile.mkdtemp(prefix="emoe"))
    (root / "ray").mkdir()
    (gcs, dashboard), programs = free_ports(2), Path(sys.executable).parent
    foreign = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    env |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(root),
        "PATH": f"{programs}{os.pathsep}{env['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    head = Head(root, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", env)
    walked = Walk(root, places(root, head), env, options.out)
    try:
        make_model(root / "hf")
        failed = walk(walked, head, options.guides, options.only)
        walked.tell(
            f"\n{len(failed)} commands failed: {failed}" if failed else "\nEvery command that was run succeeded."
        )
    finally:
        head.stop()
        for process in descendants():
            process.send_signal(signal.SIGKILL)
        shutil.rmtree(root, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
