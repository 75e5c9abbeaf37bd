"""Measures the accuracy of each saved step with transformers, greedily, on questions held out of training.

python examples/quickstart/evaluate.py examples/quickstart/run
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from tasks import evaluation_questions

QUESTIONS = Path(__file__).parent / "questions.jsonl"


def write_questions() -> None:
    """Write questions.jsonl: id, kind, prompt and answer of every evaluation question."""
    with QUESTIONS.open("w") as file:
        for number, question in enumerate(evaluation_questions()):
            line = {"id": f"{question.kind}-{number}", "kind": question.kind, "prompt": question.prompt, "answer": question.answer}
            file.write(json.dumps(line) + "\n")


def load(run: Path, step: Path) -> LlamaForCausalLM:
    """The model of one checkpoint, whole, in float32."""
    model = LlamaForCausalLM(AutoConfig.from_pretrained(run)).float().eval()
    dcp.load({"model": model.state_dict()}, checkpoint_id=step, no_dist=True)
    return model


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokenizer: AutoTokenizer, questions: list[dict[str, str]]) -> dict[str, float]:
    """The share of questions of each kind whose answer is right to the last character."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question in questions:
        prompt = tokenizer(question["prompt"], return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right[question["kind"]].append(text == question["answer"])
    return {kind: sum(each) / len(each) for kind, each in right.items()}


def main() -> None:
    """Print a table: one line a saved step, one column a kind of question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--write-questions", action="store_true", help="make questions.jsonl anew and leave")
    args = parser.parse_args()
    if args.write_questions:
        write_questions()
        return
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(args.run)
    kinds = list(dict.fromkeys(question["kind"] for question in questions))
    print("| step |", " | ".join(kinds), "|")
    for step in sorted(args.run.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_"))):
        shares = accuracy(load(args.run, step), tokenizer, questions)
        print(f"| {step.name.removeprefix('step_')} |", " | ".join(f"{shares[kind]:.1%}" for kind in kinds), "|", flush=True)


if __name__ == "__main__":
    main()
