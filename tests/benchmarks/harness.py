"""Our HellaSwag scores against lm-evaluation-harness's, row by row, with the demo's real model and rows in fp32.

    python tests/benchmarks/harness.py --rows 200 --out harness.json      # needs the demo's files: run a --demo once before

Prints the largest difference of a log-likelihood and both accuracies. tests/test_hellaswag.py uses `harness_results` too.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
from lowmem.training import demo, evaluation, records, tokenizing
from lowmem.training.heads import Head
from lowmem.training.models import CausalLM


def harness_results(model, tokenizer, rows):
    """(log-likelihoods [rows][4], {acc, acc_norm} in percent) of HellaSwag rows from lm_eval's own task, unchanged."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    text = (Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml").read_text()
    config = yaml.safe_load(text.replace("!function utils.process_docs", "null")) | {"process_docs": process_docs}
    del config["tag"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "validation.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(file)}}}
        task = ConfigurableTask(config=config | {"training_split": None})
        lm = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=4, device=str(model.device), softmax_dtype="float32"
        )
        result = lm_eval.evaluate(lm, {"hellaswag": task}, log_samples=True, bootstrap_iters=0)
    samples = sorted(result["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    scores = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
    return scores, {name: 100 * result["results"]["hellaswag"][f"{name},none"] for name in ("acc", "acc_norm")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    folder = demo.folder("model")
    where = argparse.Namespace(dataset=str(demo.folder("dataset")), train_rows=None, eval_rows=args.rows)
    rows = common.load_rows(where, "validation")
    tokenizer, max_tokens = tokenizing.load(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prepared, scored = common.evaluation_rows(rows, tokenizer, max_tokens)
    data = common.HellaSwag([], scored, max_tokens, rows=prepared)
    scores = evaluation.evaluate(CausalLM(model, Head(model), {}, torch.no_grad), data, model.device)
    ours = [row["loglikelihoods"] for row in scores.rows]
    theirs, accuracy = harness_results(model, tokenizer, rows)
    result = {
        "model": folder.name,
        "rows": len(rows),
        "largest_difference_nats": (torch.tensor(ours) - torch.tensor(theirs)).abs().max().item(),
        "harness": accuracy,
        "ours": scores.values,
        "versions": {"lm_eval": version("lm_eval"), **records.versions(model.device)},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
