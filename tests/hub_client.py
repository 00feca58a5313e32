"""What a user does with a checkpoint, in a process of its own; `test_hub.py` starts it and reads the JSON it prints."""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

SENTENCES = ["The film is a joy.", "dull", "A dull plot, but the cast is a joy to watch."]


class HiddenPackage:
    """An import hook that makes `modeling_spikebert` look as if it were not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "modeling_spikebert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def logits_of(model, tokenizer) -> list[list[float]]:
    """Logits sentence by sentence; a float32 survives JSON to the bit."""
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in SENTENCES]


def states_of(model, tokenizer) -> list[float]:
    with torch.no_grad():
        return model(**tokenizer(SENTENCES[0], return_tensors="pt")).last_hidden_state.flatten().tolist()


def scores_of(classifier) -> list[list[float]]:
    """The logits as `pipeline` gives them, in the order of the labels."""
    labels = classifier.model.config.id2label.values()
    answers = [classifier(text, top_k=None, function_to_apply="none") for text in SENTENCES]
    return [[{row["label"]: row["score"] for row in rows}[label] for label in labels] for rows in answers]


def pull(args: argparse.Namespace) -> dict:
    """Loads a checkpoint in every way that its card promises, and saves it again; then revisions of repositories."""
    tokenizer = AutoTokenizer.from_pretrained(args.source, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(args.source, trust_remote_code=True)
    base_model = AutoModel.from_pretrained(args.source, trust_remote_code=True)
    model.save_pretrained(args.save_to)
    again = AutoModelForSequenceClassification.from_pretrained(args.save_to, trust_remote_code=True)
    result = {
        "transformers_module": type(model).__module__.split(".")[0],
        "model_type": AutoConfig.from_pretrained(args.source, trust_remote_code=True).model_type,
        "logits": logits_of(model, tokenizer),
        "states": states_of(base_model, tokenizer),
        "pipeline": scores_of(pipeline("text-classification", model=args.source, trust_remote_code=True)),
        "logits_saved_again": logits_of(again, tokenizer),
        "pinned": [],
    }
    for pinned in args.pinned:
        repo, revision = pinned.split("@")
        options = {"trust_remote_code": True, "revision": revision}
        model = AutoModelForSequenceClassification.from_pretrained(repo, **options)
        result["pinned"].append(logits_of(model, AutoTokenizer.from_pretrained(repo, **options)))
    return result


def push(args: argparse.Namespace) -> dict:
    """Loads a folder with the package imported, so without `trust_remote_code`; pushes two versions of it; trains."""
    import modeling_spikebert
    from modeling_spikebert.hub import model_card

    tokenizer = AutoTokenizer.from_pretrained(args.source)
    model = AutoModelForSequenceClassification.from_pretrained(args.source)
    result = {
        "is_package_class": type(model) is modeling_spikebert.SpikeBertForSequenceClassification,
        "logits": logits_of(model, tokenizer),
        "pipeline": scores_of(pipeline("text-classification", model=args.source)),
    }
    model.push_to_hub(args.repo, commit_message="first version")
    tokenizer.push_to_hub(args.repo, commit_message="tokenizer")
    with torch.no_grad():
        model.classifier.weight.neg_()
    model.push_to_hub(args.repo, commit_message="second version")
    model_card(model, args.repo, base_model="user/teacher", license="mit", metrics={"accuracy": 0.5}).push_to_hub(
        args.repo
    )
    return result | {"trained": train(args)}


def train(args: argparse.Namespace) -> dict:
    """Distils a tiny teacher with a `DistillationTrainer` that pushes at every save."""
    from modeling_spikebert import (
        DistillationTrainer,
        DistillationTrainingArguments,
        SpikeBertForSequenceClassification,
    )

    tokenizer = AutoTokenizer.from_pretrained(args.source)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    teacher = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes))
    trainer = DistillationTrainer(
        model=SpikeBertForSequenceClassification.from_teacher(teacher, num_hidden_layers=1),
        teacher=teacher,
        args=DistillationTrainingArguments(
            output_dir=str(Path(args.save_to)),
            stage="task",
            max_steps=2,
            learning_rate=5e-5,
            save_steps=1,
            per_device_train_batch_size=2,
            push_to_hub=True,
            hub_model_id=args.trained_repo,
            hub_strategy="every_save",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{**tokenizer(text), "labels": i % 2} for i, text in enumerate(SENTENCES)],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.push_to_hub()
    files = [path.name for path in Path(args.save_to).rglob("*")]
    return {"logits": logits_of(trainer.model.eval(), tokenizer), "files": files}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=["pull", "push"])
    parser.add_argument("source", help="folder or repository")
    parser.add_argument("--repo", help="repository to push to")
    parser.add_argument("--trained-repo", help="repository that the Trainer pushes to")
    parser.add_argument("--pinned", nargs="*", default=[], metavar="REPO@COMMIT", help="revisions to load as well")
    parser.add_argument("--save-to", help="folder to write")
    args = parser.parse_args()
    warnings.simplefilter("error")
    # huggingface_hub's own call of its HTTP library, at each upload of weights.
    warnings.filterwarnings("ignore", "Use 'content=<...>' to upload raw bytes", DeprecationWarning)
    transformers.logging.disable_progress_bar()
    if args.step == "pull":
        sys.meta_path.insert(0, HiddenPackage)
    print(json.dumps({"pull": pull, "push": push}[args.step](args)))


if __name__ == "__main__":
    main()
