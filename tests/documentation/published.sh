# Commands of SGLang's published page for TPUs, as they are written there: people bring them along.
uv pip install -e "python[all]"
JAX_COMPILATION_CACHE_DIR=/tmp/jit_cache python3 -u -m sgl_jax.launch_server --model-path Qwen/Qwen-7B-Chat --trust-remote-code --dist-init-addr=0.0.0.0:10011 --nnodes=1 --tp-size=4 --device=tpu --random-seed=3 --node-rank=0 --mem-fraction-static=0.8 --max-prefill-tokens=8192 --download-dir=/tmp --dtype=bfloat16 --skip-server-warmup --host 0.0.0.0 --port 30000
python -m sgl_jax.launch_server --model-path Qwen/Qwen3-8B --trust-remote-code --tp-size=4 --device=tpu --mem-fraction-static=0.8 --chunked-prefill-size=2048 --dtype=bfloat16 --max-running-requests=256 --page-size=128 --attention-backend=fa
python -m sgl_jax.launch_server --model-path Qwen/Qwen3-32B --trust-remote-code --device=tpu --tp-size=4 --mem-fraction-static=0.8 --max-prefill-tokens=4096 --attention-backend=fa --dtype=bfloat16 --port=30000 --host=0.0.0.0 --disable-overlap-schedule --speculative-algorithm=EAGLE3 --speculative-draft-model-path=AngelSlim/Qwen3-32B_eagle3 --page-size=64 --speculative-eagle-topk=1 --speculative-num-steps=3 --speculative-num-draft-tokens=4
python -m sgl_jax.launch_server --model-path MODEL_PATH --dist-init-addr=NODE0_IP:10011 --nnodes=2 --node-rank=0 --tp-size=8
python -m sgl_jax.launch_server --model-path MODEL_PATH --dist-init-addr=NODE0_IP:10011 --nnodes=2 --node-rank=1 --tp-size=8
python -m sgl_jax.launch_server --model-path MODEL_PATH --chunked-prefill-size=2048 --enable-mixed-chunk
python -m sgl_jax.launch_server --model-path MODEL_PATH --chunked-prefill-size=-1 --page-size=1
python3 -m sgl_jax.bench_serving --backend sgl-jax --dataset-name random --num-prompts=100 --random-input=512 --random-output=128 --max-concurrency=8 --random-range-ratio=1 --warmup-requests=0
python3 -m sgl_jax.bench_serving --backend sgl-jax --dataset-name random --num-prompts 24 --random-input 1024 --random-output 1 --max-concurrency 8 --random-range-ratio 1 --disable-ignore-eos --warmup-requests 0
python3 -m sgl_jax.bench_one_batch_server --model-path Qwen/Qwen-7B-Chat --base-url http://127.0.0.1:30000 --batch-size 1 --input-len 256 --output-len 32
python3 -m sgl_jax.bench_one_batch_server --base-url http://127.0.0.1:30000 --batch-size=32 --input-len=256 --output-len=32
python -c "from sgl_jax import check_env; check_env.check_env()"
python -m sgl_jax.check_env
