"""The console script ``hunyuan-train``: pick the verb, report errors in one sentence."""

import importlib
import sys

from hunyuan_train.resilience.crashes import record_crash

VERBS = {
    "train": "train one stage; under torchrun on every rank",
    "curriculum": "run the stages of conf/curriculum, each after the one it needs",
    "certify": "prove that this layout computes what one process computes",
    "precompute": "clips and captions in, latents and text features out",
    "encode": "a video file of any length to a file of its latents",
    "decode": "a file of latents back to a video",
    "serve": "encode clips for training that runs elsewhere, until stopped",
    "plan": "layouts that fit a cluster and what they take; `plan data`, `verify`, `budget`",
    "scaling": "a scaling law from runs of several sizes; `scaling sweep` trains them",
    "sample": "videos from a run's weights and prompts",
    "convert": "weights between the official, our and the diffusers layout",
    "report": "curves, samples and figures of a run as one HTML page",
    "goodput": "where the time of a run went, over all its attempts",
    "launch": "the ranks of a verb here and on other machines, kept going",
    "doctor": "check this machine and the others before a run",
    "demo": "the whole job at tiny scale on embedded data",
}


def usage() -> str:
    """Return the help text."""
    rows = "\n".join(f"  {verb:<12} {text}" for verb, text in VERBS.items())
    return (
        "usage: hunyuan-train VERB [group=name] [section.field=value] ...\n\n"
        f"verbs:\n{rows}\n\n"
        "`hunyuan-train VERB --show` prints the composed config and stops."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 2 bad input, 75 stopped by a signal."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print(
            f"hunyuan-train: {verb} is not a verb; choose from {' '.join(VERBS)}", file=sys.stderr
        )
        return 2
    module = importlib.import_module(f"hunyuan_train.cli.{verb.replace('-', '_')}")
    try:
        return module.main(rest)
    except ValueError as error:
        if not record_crash(error):  # else the launcher says it, once for all ranks
            print(f"hunyuan-train {verb}: {error}", file=sys.stderr)
        return 2
    except BaseException as error:
        record_crash(error)
        raise
