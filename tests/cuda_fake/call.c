// Calls an FFI handler of the CUDA platform as XLA does, without XLA: float32 operands and results
// in this process's memory, a stream that is none, and so much scratch memory as is told.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

enum { kMost = 8, kRank = 3 };

struct XLA_FFI_Error {
  int code;
  char message[1 << 16];
};
// What the handler's context and these arguments are called differs between versions of the header.
typedef struct {
  int64_t memory;
} Context;
typedef struct {
  size_t struct_size;
  void* extension;
  XLA_FFI_Error* error;
  const char* message;
} MessageArgs;

static XLA_FFI_Error* error_create(XLA_FFI_Error_Create_Args* args) {
  XLA_FFI_Error* e = malloc(sizeof *e);
  e->code = (int)args->errc;
  snprintf(e->message, sizeof e->message, "%s", args->message);
  return e;
}
static void error_message(MessageArgs* args) { args->message = args->error->message; }
static void error_destroy(XLA_FFI_Error_Destroy_Args* args) { free(args->error); }
static XLA_FFI_Error* stream_get(XLA_FFI_Stream_Get_Args* args) {
  args->stream = NULL;
  return NULL;
}
static XLA_FFI_Error* allocate(XLA_FFI_DeviceMemory_Allocate_Args* args) {
  if ((int64_t)args->size > ((Context*)args->ctx)->memory) {
    XLA_FFI_Error_Create_Args create = {.message = "no memory",
                                        .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
    return error_create(&create);
  }
  args->data = malloc(args->size);
  return NULL;
}
static XLA_FFI_Error* release(XLA_FFI_DeviceMemory_Free_Args* args) {
  free(args->data);
  return NULL;
}

// One call with buffers of these dimensions, operands first; one of two dimensions has 0 behind
// them. Its error code, or 0, and the text.
int fake_call(XLA_FFI_Handler* handler, int stage, const char* config, int operands, int results,
              int64_t dims[][kRank], int64_t memory, char* message, size_t size) {
  XLA_FFI_Api api = {.struct_size = XLA_FFI_Api_STRUCT_SIZE,
                     .api_version = {.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE,
                                     .major_version = XLA_FFI_API_MAJOR,
                                     .minor_version = XLA_FFI_API_MINOR},
                     .XLA_FFI_Error_Create = error_create,
                     (void*)error_message,
                     .XLA_FFI_Error_Destroy = error_destroy,
                     .XLA_FFI_Stream_Get = stream_get,
                     .XLA_FFI_DeviceMemory_Allocate = allocate,
                     .XLA_FFI_DeviceMemory_Free = release};
  Context context = {memory};
  XLA_FFI_Buffer buffers[kMost];
  void* pointers[kMost];
  XLA_FFI_ArgType arg_types[kMost];
  XLA_FFI_RetType ret_types[kMost];
  if (operands + results > kMost) return -1;
  for (int i = 0; i < operands + results; ++i) {
    int64_t* d = dims[i];
    const int64_t rank = d[2] > 0 ? 3 : 2;
    buffers[i] = (XLA_FFI_Buffer){
        .struct_size = XLA_FFI_Buffer_STRUCT_SIZE,
        .dtype = XLA_FFI_DataType_F32,
        .data = calloc((size_t)(d[0] * d[1] * (rank == 3 ? d[2] : 1)), sizeof(float)),
        .rank = rank,
        .dims = d};
    pointers[i] = &buffers[i];
    arg_types[i] = XLA_FFI_ArgType_BUFFER;
    ret_types[i] = XLA_FFI_RetType_BUFFER;
  }
  XLA_FFI_ByteSpan name = {"config", 6}, value = {config, strlen(config)};
  XLA_FFI_ByteSpan* names[] = {&name};
  XLA_FFI_AttrType attr_types[] = {XLA_FFI_AttrType_STRING};
  void* attrs[] = {&value};
  const int execute = stage == XLA_FFI_ExecutionStage_EXECUTE;
  XLA_FFI_CallFrame frame = {
      .struct_size = XLA_FFI_CallFrame_STRUCT_SIZE,
      .api = &api,
      .ctx = (void*)&context,
      .stage = (XLA_FFI_ExecutionStage)stage,
      .args = {XLA_FFI_Args_STRUCT_SIZE, NULL, execute ? operands : 0, arg_types, pointers},
      .rets = {XLA_FFI_Rets_STRUCT_SIZE, NULL, execute ? results : 0, ret_types,
               pointers + operands},
      .attrs = {XLA_FFI_Attrs_STRUCT_SIZE, NULL, 1, attr_types, names, attrs}};
  XLA_FFI_Error* error = handler(&frame);
  for (int i = 0; i < operands + results; ++i) free(buffers[i].data);
  if (error == NULL) return 0;
  const int code = error->code;
  snprintf(message, size, "%s", error->message);
  free(error);
  return code;
}
