#!/bin/sh
# Builds the software CUDA and its self-test into the folder OUTDIR. Prints nothing when all is well.
set -eu
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"

# Modules say which version of their headers they were compiled with.
version=$(cat kernel.h device.h | cksum | cut -d ' ' -f 1)u
flags="-std=c++17 -O3 -Wall -Wextra -fPIC -fvisibility=hidden -pthread -DDEVICE_VERSION=$version -Wa,-I."

build() { # LIBRARY SOURCES AND FLAGS
    library=$1
    shift
    # shellcheck disable=SC2086
    g++ $flags -shared -Wl,-soname,"$library" "$@" -o "$out/$library"
}

# libcuda's thread-local variables are read by every device thread, at every switch.
build libcuda.so.1 -ftls-model=initial-exec runtime.cpp driver.cpp -ldl &
cuda=$!
build libnvrtc.so.13 nvrtc.cpp &
nvrtc=$!
# shellcheck disable=SC2086
g++ $flags -DCOMMON_TEXT="\"$PWD/../../kernels/common.cuh\"" -o "$out/selftest" selftest.cpp -ldl &
selftest=$!
wait $cuda
build libcublasLt.so.13 cublaslt.cpp "-L$out" -l:libcuda.so.1 '-Wl,-rpath,$ORIGIN'
wait $nvrtc
wait $selftest

# Under LD_LIBRARY_PATH, these must be found before the links of a real installation.
for library in libcuda.so.1 libnvrtc.so.13 libcublasLt.so.13; do
    ln -sf "$library" "$out/${library%.*}"
done
