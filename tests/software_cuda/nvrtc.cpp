// The CUDA run-time compiler: the C++ compiler of this machine makes a shared library of a kernel's text, and the bytes of that
// library are what real devices would have as machine code.

#include <dirent.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

// The texts in front of every kernel, as files of this folder.
asm(R"(
.pushsection .rodata
kernel_header:
.incbin "kernel.h"
.incbin "device.h"
.byte 0
.popsection
)");
extern "C" const char kernel_header[] __attribute__((visibility("hidden")));

enum Result { SUCCESS, INVALID_INPUT = 3, INVALID_PROGRAM = 4, COMPILATION = 6, INTERNAL_ERROR = 11 };

struct Program {
    std::string source, name, log, library;
};

using Strings = std::vector<std::string>;

static std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

// Runs a command, adds its messages to the log, and says whether it succeeded.
static bool run(const Strings& command, const std::string& folder, std::string& log) {
    std::vector<char*> arguments;
    for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    std::string messages = folder + "/log";
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, 2, messages.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&files, 2, 1);
    pid_t child;
    int status = 1;
    if (posix_spawnp(&child, arguments[0], &files, nullptr, arguments.data(), environ))
        log += "cannot run " + command[0] + "\n";
    else
        while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    posix_spawn_file_actions_destroy(&files);
    log += read_file(messages);
    return status == 0;
}

static const std::string EXPORTED = "extern \"C\" __attribute__((visibility(\"default\"))) ";

static bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

// Describes every `extern "C" __global__` function of the preprocessed text, with the threads of its __launch_bounds__.
static std::string describe_kernels(const std::string& text) {
    static const std::string global = "__global__", bounds = "__launch_bounds__";
    std::string result;
    for (size_t at = 0; (at = text.find(global, at)) != std::string::npos;) {
        size_t begin = text.find_last_of(";}", at) + 1;
        at += global.size();
        // The name is the first word before a parenthesis, other than an attribute.
        std::string threads = "1024", word;
        bool described = false;
        for (size_t i = begin; i < text.size() && !described; ++i) {
            if (is_word(text[i])) {
                if (!i || !is_word(text[i - 1])) word.clear();
                word += text[i];
            } else if (text[i] == '(') {
                size_t start = i + 1, comma = 0;
                int depth = 1;
                while (depth && ++i < text.size()) {
                    depth += (text[i] == '(') - (text[i] == ')');
                    if (depth == 1 && text[i] == ',' && !comma) comma = i;
                }
                if (word == bounds) {
                    threads = text.substr(start, (comma ? comma : i) - start);
                } else if (i > at && word.compare(0, 2, "__")) {
                    result += EXPORTED + "const software_cuda::Kernel " + word + "__kernel = software_cuda::describe(" + word +
                              ", (" + threads + "));\n";
                    described = true;
                }
            }
        }
    }
    return result;
}

static Result compile(Program& program, const Strings& definitions, const std::string& folder) {
    std::string source = folder + "/source.cpp", preprocessed = folder + "/kernel.cpp", object = folder + "/kernel.o",
                library = folder + "/kernel.so";
    std::ofstream(source) << "# 1 \"device.h\"\n" << kernel_header << "\n# 1 \"" << program.name << "\"\n" << program.source;
    Strings command = {"g++", "-E", "-std=c++17", "-w", "-DSOFTWARE_CUDA", "-D__CUDA_ARCH__=890", "-D__CUDACC_RTC__"};
    command.insert(command.end(), definitions.begin(), definitions.end());
    for (std::string word : {source, std::string("-o"), preprocessed}) command.push_back(word);
    if (!run(command, folder, program.log)) return COMPILATION;

    std::string text = read_file(preprocessed);
    std::ofstream(preprocessed, std::ios::app)
        << "\n# 1 \"kernels\"\n"
        << describe_kernels(text)
        << EXPORTED << "const unsigned software_cuda_version = " << DEVICE_VERSION << ";\n"
        << EXPORTED << "char* software_cuda_statics() {\n"
        << "    static thread_local char anchor[16];\n    return anchor;\n}\n";
    // Checked are what a device faults on or would do silently; local variables begin as garbage. Symbols must not be shared
    // with other modules, which may have other kernels and functions of the same names.
    command = {"g++", "-c", "-O1", "-std=c++17", "-w", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-exceptions",
               "-fno-rtti", "-fno-asynchronous-unwind-tables", "-fno-math-errno", "-fno-strict-aliasing", "-ffp-contract=off",
               "-ftrivial-auto-var-init=pattern", "-fsanitize=alignment,bounds,shift,integer-divide-by-zero",
               "-fno-sanitize-recover=all", "-D__global__=__attribute__((visibility(\"default\")))",
               "-D__launch_bounds__(...)=", preprocessed, "-o", object};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) command.push_back("-march=x86-64-v3");  // for fmaf
    if (!run(command, folder, program.log)) return COMPILATION;
    // Linked apart, as the compiler would add its own library for the checks.
    if (!run({"gcc", "-shared", "-Wl,-Bsymbolic", object, "-o", library, "-lm"}, folder, program.log)) return COMPILATION;
    program.library = read_file(library);
    return SUCCESS;
}

static void remove_folder(const std::string& folder) {
    if (DIR* entries = opendir(folder.c_str())) {
        while (dirent* entry = readdir(entries)) unlink((folder + "/" + entry->d_name).c_str());
        closedir(entries);
    }
    rmdir(folder.c_str());
}

API nvrtcVersion(int* major, int* minor) {
    *major = 13, *minor = 0;
    return SUCCESS;
}

API nvrtcCreateProgram(Program** program, const char* source, const char* name, int headers, const char* const*,
                       const char* const*) {
    if (!source || headers) return INVALID_INPUT;
    *program = new Program{source, name ? name : "default_program", "", ""};
    return SUCCESS;
}

API nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

API nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    Strings definitions;
    const std::string long_name = "--define-macro=";
    for (int i = 0; i < count; ++i) {
        std::string option = options[i];
        if ((option == "-D" || option == "--define-macro") && i + 1 < count)
            definitions.push_back("-D" + std::string(options[++i]));
        else if (option.compare(0, long_name.size(), long_name) == 0)
            definitions.push_back("-D" + option.substr(long_name.size()));
        else if (option.compare(0, 2, "-D") == 0)
            definitions.push_back(option);
    }
    const char* root = getenv("TMPDIR");
    std::string folder = std::string(root && *root ? root : "/tmp") + "/software_cuda.XXXXXX";
    program->log.clear();
    if (!mkdtemp(folder.data())) return INTERNAL_ERROR;
    Result result = compile(*program, definitions, folder);
    remove_folder(folder);
    return result;
}

API nvrtcGetProgramLogSize(Program* program, size_t* size) {
    *size = program->log.size() + 1;
    return SUCCESS;
}

API nvrtcGetProgramLog(Program* program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}

API nvrtcGetCUBINSize(Program* program, size_t* size) {
    *size = program->library.size();
    return program->library.empty() ? INVALID_PROGRAM : SUCCESS;
}

API nvrtcGetCUBIN(Program* program, char* bytes) {
    memcpy(bytes, program->library.data(), program->library.size());
    return program->library.empty() ? INVALID_PROGRAM : SUCCESS;
}

API nvrtcGetPTXSize(Program* program, size_t* size) { return nvrtcGetCUBINSize(program, size); }
API nvrtcGetPTX(Program* program, char* bytes) { return nvrtcGetCUBIN(program, bytes); }

static const int architectures[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

API nvrtcGetNumSupportedArchs(int* count) {
    *count = sizeof architectures / sizeof *architectures;
    return SUCCESS;
}

API nvrtcGetSupportedArchs(int* list) {
    memcpy(list, architectures, sizeof architectures);
    return SUCCESS;
}

extern "C" __attribute__((visibility("default"))) const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case SUCCESS: return "NVRTC_SUCCESS";
        case INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
        case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
        case COMPILATION: return "NVRTC_ERROR_COMPILATION";
        default: return "NVRTC_ERROR_INTERNAL_ERROR";
    }
}
