# Compiles for 64-bit Arm Linux on another machine: SYSROOT is the folder that sysroot.sh made.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES SYSROOT)
# The interpreter is this machine's, as it runs here; the headers are the other's. Debian keeps pyconfig.h
# apart from them, and the rest of that folder is the C library, which the compiler has already.
file(GLOB Python_INCLUDE_DIR "${SYSROOT}/usr/include/python3.*")
string(REGEX REPLACE ".*python3\\." "3" version "${Python_INCLUDE_DIR}")
set(PYTHON_MODULE_EXTENSION ".cpython-${version}-aarch64-linux-gnu.so" CACHE STRING "")
set(CMAKE_CXX_FLAGS_INIT "-idirafter ${SYSROOT}/usr/include")
