"""A page that classifies a sentence, draws its spikes, and compares its energy with BERT's.

    pip install -c constraints.txt ".[demo]"
    python examples/space/app.py

It is a Space for Hugging Face; README.md says how to push it. The environment variable SPIKEBERT_MODEL names the model,
a folder or a repository of the Hub. Without it the app takes the checkpoint of the clone that it lies in.
"""

import os
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import gradio as gr
from matplotlib import rcParams
from matplotlib.figure import Figure
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from modeling_spikebert.energy import EnergyComparison, estimate_energy
from modeling_spikebert.pictures import SentenceSpikes, raster, spikes_of

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "spikebert-6x384-sst2"
MODEL = os.environ.get("SPIKEBERT_MODEL") or CHECKPOINT
if MODEL == CHECKPOINT and not CHECKPOINT.is_dir():
    sys.exit("app.py: there is no model. Set SPIKEBERT_MODEL to a folder, or to a repository of the Hub (user/name).")

EXAMPLES = [
    "A wonderful film, funny and moving.",
    "The plot is thin and the jokes are old.",
    "Not bad, though I would not watch it twice.",
]
MOST_LETTERS = 500
MOST_TOKENS = 128  # as in the raster

INTRODUCTION = """
# A sentence, read in spikes
SpikeBERT is a Transformer with spiking neurons: each one fires or stays silent. Hardware that skips silent neurons
saves their energy. Type a sentence about a film and see what it takes.
"""
CLASS = "<h2>{answer}</h2>{bars}"
ENERGY = """
<h3>Energy of this sentence: {share:.1f} % of BERT-base's</h3>
<p>For arithmetic alone, without memory traffic, it is {arithmetic_share:.1f} %.</p>
{bars}
<p class="key"><i class="arithmetic"></i> arithmetic <i class="memory"></i> memory traffic</p>
<p class="note">These are theoretical energies: operations and bytes are counted, and priced for a 45 nm chip that skips
silent neurons. A CPU or GPU saves less. BERT-base has 12 layers, 768 wide, like MPNet, the teacher of the checkpoint
spikebert-6x384-sst2.</p>
"""
CSS = """
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 0.4rem 0.8rem; align-items: center }
.bars span { display: flex; height: 1.1rem }
.class .bars span { background: #EFEFEF }
.arithmetic, .score { background: #D55E00 }
.memory { background: #0072B2 }
.key i { display: inline-block; width: 0.8rem; height: 0.8rem; margin-left: 0.8rem }
.key i:first-child { margin-left: 0 }
.energy p { margin: 0.4rem 0 0.8rem }
.energy .note { font-size: 0.85rem; opacity: 0.75 }
"""
# Of the files that Gradio brings for this font, the one of weight 600, its default, lacks most letters.
FONT = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
THEME = gr.themes.Default(primary_hue="blue", font=[FONT, "system-ui", "sans-serif"])

rcParams["savefig.dpi"] = 160  # Gradio saves the pictures, and has no option for it

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForSequenceClassification.from_pretrained(MODEL).eval()
# Its weights are random: what a dense model computes does not depend on them.
bert = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=model.config.vocab_size)).eval()


def read(text: str, num_time_steps: int) -> tuple[str, Figure, str]:
    """Class and energies as HTML, and between them the raster."""
    model.config.num_time_steps = num_time_steps  # `estimate_energy` counts those of the config
    try:
        spikes = spikes_of(model, tokenizer, text)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    inputs = tokenizer(text, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
    comparison = EnergyComparison(estimate_energy(model, inputs), estimate_energy(bert, inputs))
    figure = raster(replace(spikes, logits=None))  # the class stands in its own place
    return classes(spikes), figure, energies(comparison)


def classes(spikes: SentenceSpikes) -> str:
    scores = dict(zip(spikes.labels, (100 * spikes.scores[-1]).tolist(), strict=True))
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    rows = [(label, {"score": scores[label]}, f"{scores[label]:.1f} %") for label in ranked]
    return CLASS.format(answer=escape(ranked[0]), bars=bars(rows))


def energies(comparison: EnergyComparison) -> str:
    student, teacher = comparison.reports
    steps = "1 time step" if student.num_time_steps == 1 else f"{student.num_time_steps} time steps"
    reports = {
        f"SpikeBERT, {steps}": student,
        "BERT-base in int8": comparison.teacher_in_int8,
        "BERT-base": teacher,
    }
    percent = 100 / max(report.energy_with_memory_mj for report in reports.values())
    rows = []
    for name, report in reports.items():
        parts = {"arithmetic": report.strict.energy_mj * percent, "memory": report.memory_energy_mj * percent}
        rows.append((name, parts, f"{report.energy_with_memory_mj:.2f} mJ"))
    return ENERGY.format(
        share=100 * student.energy_with_memory_mj / teacher.energy_with_memory_mj,
        arithmetic_share=100 * student.strict.energy_mj / teacher.strict.energy_mj,
        bars=bars(rows),
    )


def bars(rows: list[tuple[str, dict[str, float], str]]) -> str:
    """A bar for each row: its name, its parts in percent of the width, and the figure behind it."""
    cells = []
    for name, parts, figure in rows:
        drawn = "".join(f'<i class="{part}" style="width: {width:.2f}%"></i>' for part, width in parts.items())
        cells.append(f"<b>{escape(name)}</b><span>{drawn}</span><b>{figure}</b>")
    return f'<div class="bars">{"".join(cells)}</div>'


with gr.Blocks(title="SpikeBERT", analytics_enabled=False) as demo:
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column(scale=2):
            text = gr.Textbox(EXAMPLES[0], label="Sentence", max_length=MOST_LETTERS)
            examples = gr.Examples([[example] for example in EXAMPLES], [text])
            steps = gr.Slider(1, 8, value=1, step=1, label="Time steps", info="More steps take more energy.")
            button = gr.Button("Classify", variant="primary")
            answer = gr.HTML(elem_classes="class")
        with gr.Column(scale=3):
            picture = gr.Plot(format="png", show_label=False)
            energy = gr.HTML(elem_classes="energy")
    # One at a time: the number of time steps is a value of the model.
    event = {"fn": read, "inputs": [text, steps], "outputs": [answer, picture, energy], "concurrency_id": "model"}
    gr.on(
        [demo.load, button.click, text.submit, steps.change], **event, api_name="classify", trigger_mode="always_last"
    )
    examples.load_input_event.then(**event, api_visibility="private")

if __name__ == "__main__":
    demo.launch(theme=THEME, css=CSS, ssr_mode=False, footer_links=["api"])
