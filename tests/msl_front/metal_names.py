"""Names of metal:: that a global name of ours would meet once `using namespace metal` stands in a file.

Functions of ours may overload functions: the stand-in declares those, and clang finds calls that fit both.
"""

from __future__ import annotations

TYPES_OF_METAL = frozenset(
    """
    access acceleration_structure address address_mode array array_ref atomic
    border_color bias command_buffer component compare_func compute_command
    compute_pipeline_state coord depth2d depth2d_array
    depth2d_ms depth2d_ms_array depthcube depthcube_array extended_limits filter
    geometry_type gradient2d gradient3d gradientcube imageblock imageblock_data
    imageblock_layout_explicit imageblock_layout_implicit indirect_command_buffer instance_acceleration_structure
    instancing integral_constant interpolant intersection_function_table
    intersection_params intersection_query intersection_result intersection_type intersector is_same level lod_options
    mag_filter matrix max_anisotropy max_levels mem_flags memory_order mesh mesh_grid_properties
    min_filter min_lod_clamp mip_filter numeric_limits packed_vec     primitive_acceleration_structure primitive_type quad_vote r_address raster_order_group
    rasterization_rate_map_data rasterization_rate_map_decoder ray raytracing render_command
    render_pipeline_state s_address sampler simd_vote simdgroup_matrix     t_address tensor texture1d texture1d_array texture2d texture2d_array texture2d_ms texture2d_ms_array texture3d
    texture_buffer texturecube texturecube_array thread_scope transform_address     uniform vec vec_elements visible_function_table     add_const add_cv add_volatile aligned_storage alignment_of common_type conditional conditional_t decay decay_t
    enable_if enable_if_t extent false_type integer_sequence index_sequence is_arithmetic is_array is_base_of
    is_class is_const is_convertible is_empty is_enum is_floating_point is_function is_integral is_pointer
    is_reference is_scalar is_signed is_trivial is_union is_unsigned is_vector is_void make_index_sequence
    make_integer_sequence make_signed make_unsigned rank remove_addrspace remove_const remove_cv remove_pointer
    remove_reference result_of true_type underlying_type fast precise memory_order_relaxed
    """.split()
)
FUNCTIONS_OF_METAL = frozenset(
    """
    abs absdiff acos acosh addsat all any as_type asin asinh atan atan2 atan2pi atanh atomic_fetch_add_explicit
    atomic_load_explicit atomic_store_explicit calculate_clamped_lod calculate_unclamped_lod ceil clamp clz copysign cos
    cosh cospi cross ctz determinant dfdx dfdy discard_fragment distance distance_squared divide dot exp exp10 exp2
    extract_bits fabs faceforward fdim floor fma fmax fmax3 fmedian3 fmin fmin3 fmod fract frexp fwidth
    get_num_samples get_sample_position get_null_sampler hadd ilogb insert_bits is_null_texture isfinite isinf isnan
    isnormal isordered isunordered ldexp length length_squared log log10 log2 mad24 madhi madsat max max3 median3 min
    min3 mix modf mul24 mulhi nan nextafter normalize pack_float_to_snorm2x16 pack_float_to_snorm4x8
    pack_float_to_srgb_unorm4x8 pack_float_to_unorm10a2 pack_float_to_unorm2x16 pack_float_to_unorm4x8
    pack_float_to_unorm565 pack_half_to_snorm4x8 pack_half_to_unorm4x8 popcount pow powr quad_all quad_any
    quad_broadcast quad_is_first quad_max quad_min quad_shuffle quad_shuffle_down quad_shuffle_up quad_shuffle_xor
    quad_sum reflect refract reverse_bits rhadd rint rotate round rsqrt saturate select sign signbit simd_all
    simd_any simd_ballot simd_broadcast simd_is_first simd_max simd_min simd_prefix_exclusive_sum
    simd_prefix_inclusive_sum simd_product simd_shuffle simd_shuffle_down simd_shuffle_up simd_shuffle_xor simd_sum
    simdgroup_barrier simdgroup_load simdgroup_multiply simdgroup_multiply_accumulate simdgroup_store sin sincos sinh
    sinpi smoothstep sqrt step subsat swap tan tanh tanpi threadgroup_barrier transpose trunc unpack_snorm2x16_to_float
    unpack_snorm4x8_to_float unpack_unorm2x16_to_float unpack_unorm4x8_to_float unpack_unorm4x8_to_half
    """.split()
)
