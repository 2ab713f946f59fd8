"""lm-eval in one process with a model: our command beside lm-eval's own adapter for transformers.

Arguments: the folder of a model, and a folder to write in. Prints the samples of both.
"""

import json
import shutil
import sys
from pathlib import Path

import lm_eval
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from moesaic import cli

model, folder = sys.argv[1], Path(sys.argv[2])
source = Path(__file__).parent / "lm_eval_tasks"
tasks = folder / "tasks"
tasks.mkdir()
for path in source.glob("*.yaml"):
    (tasks / path.name).write_text(path.read_text().replace("DATA", str(tasks)))
shutil.copy(source / "choices.jsonl", tasks)
manager = TaskManager(include_path=str(tasks), include_defaults=False)


def ours(name, *flags):
    """Return the results of our command, and all answers."""
    out, samples = folder / "out.json", folder / "samples.jsonl"
    flags = ["--tasks", name, "--include-path", str(tasks), "--dtype", "float32", "--format", "float32", *flags]
    files = ["--out", str(out), "--samples-out", str(samples)]
    assert cli.main(["eval", model, *flags, *files]) == 0
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    [entry] = json.loads(out.read_text())["figures"]["formats"]
    return {"results": entry["results"], "answers": [line["filtered_resps"] for line in lines]}


def tokenizer(add_bos_token):
    """Return the model's tokenizer, which adds no BOS by itself, with or without one."""
    opened = transformers.AutoTokenizer.from_pretrained(model)
    if add_bos_token:
        bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", opened.bos_token_id)])
        opened.backend_tokenizer.post_processor = bos
    return opened


reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")


def theirs(name, max_length, add_bos_token, **options):
    """Return the results of lm-eval's adapter for transformers, and all answers."""
    lm = HFLM(
        pretrained=reference,
        tokenizer=tokenizer(add_bos_token),
        max_length=max_length,
        add_bos_token=add_bos_token,
        batch_size=4,
    )
    options = {"task_manager": manager, "fewshot_random_seed": 1234, **options}
    found = lm_eval.simple_evaluate(model=lm, tasks=[name], **options)
    answers = [sample["filtered_resps"] for sample in found["samples"][name]]
    return {"results": found["results"], "answers": answers}


pairs = {}
for case, name, length, bos, options in (
    ("choices", "tales_choices", 1024, True, {}),
    ("shots", "tales_shots", 1024, True, {}),
    ("cut", "tales_shots", 16, True, {}),
    ("limit", "tales_shots", 1024, True, {"limit": 2, "num_fewshot": 1}),
    ("whole", "tales_whole", 1024, False, {}),
    ("windows", "tales_whole", 12, False, {}),
    ("told", "tales_told", 1024, True, {}),
    ("told, cut", "tales_told", 32, True, {}),
):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    pairs[case] = [ours(name, "--context", str(length), *flags), theirs(name, length, bos, **options)]
chat = ours("tales_told", "--apply-chat-template")
lists = [cli.main(["eval", "--tasks", "tales_chioces", "--include-path", str(tasks)])]
print(json.dumps({"pairs": pairs, "chat": chat, "unknown": lists}))
