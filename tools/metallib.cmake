# Kernels compiled by Apple's compiler, where it is: jml_add_metallibs(<target> <folder> <files>...)
# makes <folder>/<stem>.metallib of each file with `xcrun metal`, and sets JML_METALLIBS in the caller
# to their paths, or to nothing where Xcode's compiler is missing; then Metal compiles the text at run
# time. Never run by Apple's tools yet: tests/test_metallib.py has a stand-in for xcrun.
#
# The options say what csrc/device_metal.cc says to the run-time compiler: Metal 3.1, macOS 14, no
# relaxed arithmetic.
function(jml_add_metallibs target folder)
  set(JML_METALLIBS "" PARENT_SCOPE)
  find_program(JML_XCRUN xcrun DOC "Runs Apple's developer tools")
  if(NOT JML_XCRUN)
    return()
  endif()
  foreach(tool IN ITEMS metal metallib)
    # The command line tools alone have xcrun and no compiler for Metal.
    execute_process(COMMAND "${JML_XCRUN}" -sdk macosx --find ${tool}
      RESULT_VARIABLE missing OUTPUT_QUIET ERROR_QUIET)
    if(missing)
      message(STATUS "xcrun finds no ${tool}: kernels are compiled at run time")
      return()
    endif()
  endforeach()
  set(made "")
  foreach(kernel IN LISTS ARGN)
    get_filename_component(stem "${kernel}" NAME_WE)
    set(air "${CMAKE_CURRENT_BINARY_DIR}/${stem}.air")
    set(library "${folder}/${stem}.metallib")
    add_custom_command(OUTPUT "${library}"
      COMMAND "${CMAKE_COMMAND}" -E make_directory "${folder}"
      COMMAND "${JML_XCRUN}" -sdk macosx metal -std=metal3.1 -mmacosx-version-min=14.0 -O2
              -fno-fast-math -c "${kernel}" -o "${air}"
      COMMAND "${JML_XCRUN}" -sdk macosx metallib "${air}" -o "${library}"
      WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" DEPENDS ${ARGN} VERBATIM)
    list(APPEND made "${library}")
  endforeach()
  add_custom_target(${target} ALL DEPENDS ${made})
  set(JML_METALLIBS "${made}" PARENT_SCOPE)
endfunction()
