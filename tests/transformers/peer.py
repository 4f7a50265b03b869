"""What Hugging Face transformers makes of an exported model, as JSON, and what it writes itself, into a folder.

    python peer.py EXPORT REQUEST.json OUTPUT

REQUEST holds `texts` to tokenize, `inputs` (rows of tokens) for logits, and a `prompt` to continue by `new_tokens`.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

export, request, output = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
model, loading = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
assert isinstance(model, GPT2LMHeadModel) and not any(loading.values()), loading
tokenizer = AutoTokenizer.from_pretrained(export)
model.eval()

with torch.no_grad():
    # In double precision, so that every difference is bandtrain's.
    logits = model.double()(torch.tensor(request["inputs"])).logits
    model.float()
    prompt = torch.tensor([request["prompt"]])
    continued = model.generate(prompt, do_sample=False, max_new_tokens=request["new_tokens"])

ids = [tokenizer(text)["input_ids"] for text in request["texts"]]
answer = {
    "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    "logits": logits.flatten().tolist(),
    "continued": continued[0].tolist()[len(request["prompt"]) :],
    "ids": ids,
    "decoded": [tokenizer.decode(row) for row in ids],
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length],
}

model.save_pretrained(output / "again")
model.transformer.save_pretrained(output / "headless")
model.bfloat16().save_pretrained(output / "bf16")
torch.manual_seed(1)
fresh = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=24, vocab_size=211)).eval()
fresh.save_pretrained(output / "fresh")
with torch.no_grad():
    answer["fresh_logits"] = fresh.double()(torch.arange(24)[None]).logits.flatten().tolist()

Path(output / "answer.json").write_text(json.dumps(answer))
