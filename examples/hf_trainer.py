"""A recipe under Hugging Face's Trainer: give it the tuned model and the tuner's optimizer, nothing else changes.

python examples/hf_trainer.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import efftune

config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
torch.manual_seed(0)
model = LlamaForCausalLM(config)

# Bytes of this very file, in windows of 64.
text = torch.tensor(list(open(__file__, "rb").read()))
data = [{"input_ids": window, "labels": window} for window in text.unfold(0, 64, 16)]

tuner = efftune.apply(model, "lora(r=8, target_modules='all-linear') + lisa(layers=2, interval=10)")
print(tuner.summary())
trainer = Trainer(
    model=tuner.model,
    args=TrainingArguments(
        output_dir="runs/hf-trainer", max_steps=40, per_device_train_batch_size=8, logging_steps=10,
        gradient_accumulation_steps=2, report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=data,
    # The tuner's optimizer carries the recipe's clock; Trainer makes its own schedule on top of it.
    optimizers=(tuner.optimizer(lr=1e-2), None),
)  # fmt: skip
trainer.train()
tuner.save("runs/hf-trainer/adapter")
print(f"{tuner.step} optimizer steps; the adapter is in runs/hf-trainer/adapter")
