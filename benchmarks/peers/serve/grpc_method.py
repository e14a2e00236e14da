"""What `protoc` would write for the one method that the peer answers: Serve asks for it by import path."""

import grpc
from open_inference_pb2 import ModelInferRequest, ModelInferResponse

SERVICE = "inference.GRPCInferenceService"


def add_to_server(servicer, server):
    """Register the method."""
    method = grpc.unary_unary_rpc_method_handler(
        servicer.ModelInfer,
        request_deserializer=ModelInferRequest.FromString,
        response_serializer=ModelInferResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": method}),))
