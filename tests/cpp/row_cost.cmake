# cmake -DPROGRAM=<rmsnorm_row_cost> -DVALGRIND=<valgrind> -DWORK_DIR=<scratch> -P row_cost.cmake
#
# Counts the instructions of a row: those of 1024 rows more, over 1024. Valgrind tells programs of
# one and the same CPU wherever it runs, so that groups of rows have the same size. The bounds leave
# a quarter to other versions than gcc 12.
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
foreach(case IN ITEMS
    "forward f32 8 170" "forward f32 16 170" "forward bf16 16 200"
    "backward f32 8 260" "backward f32 16 265" "backward bf16 16 305")
  string(REPLACE " " ";" case "${case}")
  list(GET case 0 pass)
  list(GET case 1 dtype)
  list(GET case 2 n)
  list(GET case 3 most)
  count(${pass} ${dtype} 1024 ${n} fewer)
  if(NOT fewer)
    return()
  endif()
  count(${pass} ${dtype} 2048 ${n} more)
  math(EXPR each "(${more} - ${fewer}) / 1024")
  message("${pass} ${dtype} n = ${n}: ${each} instructions a row, ${most} at most")
  if(each GREATER most)
    list(APPEND too_many "${pass} ${dtype} n = ${n}")
  endif()
endforeach()
if(too_many)
  message(FATAL_ERROR "more instructions than allowed: ${too_many}")
endif()
