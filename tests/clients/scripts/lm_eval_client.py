"""lm-eval with tasks of its own: the server, the tokenizer's folder, and a folder to write in. Prints what it found."""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

url, tokenizer, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
source = Path(__file__).parent / "lm_eval_tasks"
for path in source.glob("*.yaml"):
    (folder / path.name).write_text(path.read_text().replace("DATA", str(folder)))
shutil.copy(source / "choices.jsonl", folder)


def evaluate(model, task, **options):
    arguments = {"model": "tales", "num_concurrent": 1, "max_retries": 1, **options}
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template="chat" in model,
    )


backend = {"tokenizer_backend": "remote"} if tokenizer == "remote" else {"tokenizer": tokenizer}
scored = evaluate(
    "local-completions",
    "tales_choices",
    base_url=f"{url}/v1/completions",
    batch_size=4,
    **({"tokenizer_backend": "huggingface"} | backend),
)
told = evaluate("local-chat-completions", "tales_told", base_url=f"{url}/v1/chat/completions", tokenizer_backend=None)
likelihoods = [sample["filtered_resps"] for sample in scored["samples"]["tales_choices"]]
answers = [sample["filtered_resps"][0] for sample in told["samples"]["tales_told"]]
accuracy = scored["results"]["tales_choices"]["acc,none"]
print(json.dumps({"version": version("lm_eval"), "accuracy": accuracy, "likelihoods": likelihoods, "answers": answers}))
