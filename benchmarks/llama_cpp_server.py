"""llama.cpp's own server, out of the package xllamacpp: `python llama_cpp_server.py MODEL.gguf PORT`, in an environment that has it."""

import sys
import time

import xllamacpp

if __name__ == "__main__":
    params = xllamacpp.CommonParams()
    params.model.path, params.port = sys.argv[1], int(sys.argv[2])
    params.model_alias = "m"
    params.n_parallel, params.kv_unified, params.n_ctx = 32, True, 8192
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    print(xllamacpp.get_system_info(), flush=True)
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)
