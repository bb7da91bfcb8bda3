"""What vLLM answers, greedily, in float32: run by its own Python, which has nothing of this package.

`python vllm_script.py job.json answers.json`: a job is a list of engines, of each the folder of a model, adapters by
name, and requests: a text, ids or a chat, with the name of an adapter or none. Requests are one batch.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path


def run(engine: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    started = time.monotonic()
    loras = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(engine.get("loras", {}).items(), start=1)
    }
    more = {}
    if loras:
        more = {
            "enable_lora": True,
            "max_lora_rank": engine["max_lora_rank"],
            "max_loras": len(loras),
            "lora_target_modules": ["embed_tokens", "lm_head"],
        }
    llm = LLM(
        engine["model"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=len(engine["requests"]),
        seed=0, disable_log_stats=True, **more,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    prompts, adapters = [], []
    for request in engine["requests"]:
        if "chat" in request:
            text = tokenizer.apply_chat_template(request["chat"], tokenize=False, add_generation_prompt=True)
            prompts.append({"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]})
        else:
            prompts.append({"prompt_token_ids": request["ids"]} if "ids" in request else request["text"])
        adapters.append(loras.get(request.get("lora")))
    ready = time.monotonic()
    sampling = SamplingParams(temperature=0, max_tokens=engine["max_tokens"])
    outputs = llm.generate(prompts, sampling, lora_request=adapters if loras else None, use_tqdm=False)
    answers = [
        {
            "prompt": list(output.prompt_token_ids),
            "answer": list(output.outputs[0].token_ids),
            "finish": output.outputs[0].finish_reason,
        }
        for output in outputs
    ]
    seconds = {"load": round(ready - started, 1), "answer": round(time.monotonic() - ready, 1)}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"answers": answers, "seconds": seconds}


if __name__ == "__main__":
    import vllm

    job, out = map(Path, sys.argv[1:])
    engines = [run(engine) for engine in json.loads(job.read_text())]
    out.write_text(json.dumps({"version": vllm.__version__, "engines": engines}))
