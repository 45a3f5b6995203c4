# cmake -DPROGRAM=<rmsnorm_row_cost> -DVALGRIND=<valgrind> -DWORK_DIR=<scratch> -P row_cost.cmake
#
# Counts the instructions of a row: those of 1024 rows more, over 1024; and those of a call, which has
# one row. Valgrind tells programs of one and the same CPU wherever it runs, so that groups of rows
# have the same size. The bounds leave a quarter to other versions than gcc 12.
cmake_minimum_required(VERSION 3.18...4.0)

function(count pass dtype rows n result)
  execute_process(
    COMMAND ${VALGRIND} --tool=callgrind --toggle-collect=counted_${pass}
            --callgrind-out-file=${WORK_DIR}/row_cost.out ${PROGRAM} ${dtype} ${rows} ${n}
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(status EQUAL 77)
    message("skipped: no AVX2")
    set(${result} "" PARENT_SCOPE)
  elseif(NOT status EQUAL 0 OR NOT output MATCHES "Collected : ([1-9][0-9]*)")
    message(FATAL_ERROR "${output}")
  else()
    set(${result} ${CMAKE_MATCH_1} PARENT_SCOPE)
  endif()
endfunction()

set(too_many)
function(compare what each most)
  message("${what}: ${each} instructions, ${most} at most")
  if(each GREATER most)
    set(too_many "${too_many};${what}" PARENT_SCOPE)
  endif()
endfunction()

foreach(case IN ITEMS
    "forward f32 8 125 1860" "forward f32 16 130 1860" "forward bf16 16 145 1880"
    "backward f32 8 255 6500" "backward f32 16 255 6500" "backward bf16 16 300 7000")
  string(REPLACE " " ";" case "${case}")
  list(GET case 0 pass)
  list(GET case 1 dtype)
  list(GET case 2 n)
  list(GET case 3 most)
  list(GET case 4 most_of_call)
  count(${pass} ${dtype} 1 ${n} call)
  if(NOT call)
    return()
  endif()
  count(${pass} ${dtype} 1024 ${n} fewer)
  count(${pass} ${dtype} 2048 ${n} more)
  math(EXPR each "(${more} - ${fewer}) / 1024")
  compare("${pass} ${dtype} n = ${n}, a row" ${each} ${most})
  compare("${pass} ${dtype} n = ${n}, a call" ${call} ${most_of_call})
endforeach()
if(too_many)
  message(FATAL_ERROR "more instructions than allowed:${too_many}")
endif()
