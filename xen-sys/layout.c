/*
 * Sizes, offsets and a constant as the C compiler sees them, by name. The layout test compares each with
 * what the Rust side believes, so a wrong binding can't go unnoticed.
 */
#define __XEN_TOOLS__ 1
#define LIBXL_API_VERSION 0x041400

#include <stddef.h>
#include <string.h>

#include <xenctrl.h>
#include <xenguest.h>
#include <xentoollog.h>
#include <libxl.h>
#include <libxl_event.h>

struct entry {
    const char *name;
    size_t value;
};

#define SIZE(type) { #type, sizeof(type) }
#define OFFSET(type, field) { #type "." #field, offsetof(type, field) }

static const struct entry entries[] = {
    SIZE(grant_entry_v1_t),
    OFFSET(grant_entry_v1_t, frame),
    SIZE(grant_entry_v2_t),
    OFFSET(grant_entry_v2_t, full_page.frame),
    OFFSET(grant_entry_v2_t, sub_page.frame),
    SIZE(vcpu_guest_context_x86_64_t),
    OFFSET(vcpu_guest_context_x86_64_t, user_regs),
    OFFSET(vcpu_guest_context_x86_64_t, user_regs.rdx),
    OFFSET(vcpu_guest_context_x86_64_t, flags),
    OFFSET(vcpu_guest_context_x86_64_t, gdt_frames),
    OFFSET(vcpu_guest_context_x86_64_t, gdt_ents),
    OFFSET(vcpu_guest_context_x86_64_t, ctrlreg),
    SIZE(vcpu_guest_context_any_t),
    SIZE(shared_info_x86_64_t),
    OFFSET(shared_info_x86_64_t, arch.max_pfn),
    OFFSET(shared_info_x86_64_t, arch.pfn_to_mfn_frame_list_list),
    OFFSET(shared_info_x86_64_t, arch.p2m_cr3),
    OFFSET(shared_info_x86_64_t, arch.p2m_vaddr),
    OFFSET(shared_info_x86_64_t, arch.p2m_generation),
    SIZE(start_info_t),
    OFFSET(start_info_t, store_mfn),
    OFFSET(start_info_t, console.domU.mfn),
    SIZE(struct xen_domctl),
    OFFSET(struct xen_domctl, domain),
    OFFSET(struct xen_domctl, u),
    SIZE(struct xen_domctl_getdomaininfo),
    OFFSET(struct xen_domctl_getdomaininfo, tot_pages),
    OFFSET(struct xen_domctl_getdomaininfo, shared_info_frame),
    OFFSET(struct xen_domctl_getdomaininfo, max_vcpu_id),
    OFFSET(struct xen_domctl_getdomaininfo, handle),
    SIZE(struct xen_domctl_shadow_op),
    OFFSET(struct xen_domctl_shadow_op, dirty_bitmap),
    OFFSET(struct xen_domctl_shadow_op, pages),
    OFFSET(struct xen_domctl_shadow_op, stats),
    SIZE(struct xen_domctl_getpageframeinfo3),
    OFFSET(struct xen_domctl_getpageframeinfo3, array),
    SIZE(struct xen_domctl_ext_vcpucontext),
    OFFSET(struct xen_domctl_ext_vcpucontext, size),
    SIZE(struct xen_domctl_vcpuextstate),
    OFFSET(struct xen_domctl_vcpuextstate, buffer),
    SIZE(struct xen_domctl_vcpu_msrs),
    SIZE(xen_domctl_vcpu_msr_t),
    OFFSET(struct xen_domctl_vcpu_msrs, msrs),
    SIZE(struct xen_domctl_getvcpuinfo),
    SIZE(struct xen_sysctl_physinfo),
    SIZE(xen_cpuid_leaf_t),
    SIZE(xen_msr_entry_t),
    { "DOMID_FIRST_RESERVED", DOMID_FIRST_RESERVED },
    SIZE(xc_hypercall_buffer_t),
    OFFSET(xc_hypercall_buffer_t, hbuf),
    SIZE(xentoollog_logger),
    SIZE(libxl_domain_config),
    OFFSET(libxl_domain_config, num_pcidevs),
    OFFSET(libxl_domain_config, on_reboot),
    SIZE(libxl_domain_restore_params),
    SIZE(libxl_event),
    OFFSET(libxl_event, u),
    SIZE(libxl_device_disk),
    SIZE(libxl_device_nic),
    SIZE(libxl_device_pci),
    SIZE(libxl_dominfo),
    SIZE(struct save_callbacks),
    SIZE(struct xc_domain_meminfo),
};

/* The size or offset of that name; (size_t)-1 if there is none. */
size_t xen_sys_layout(const char *name);

size_t xen_sys_layout(const char *name)
{
    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++)
        if (strcmp(entries[i].name, name) == 0)
            return entries[i].value;
    return (size_t)-1;
}

/* How many entries there are, so that the test can tell that it has covered them all. */
size_t xen_sys_layout_entries(void);

size_t xen_sys_layout_entries(void)
{
    return sizeof(entries) / sizeof(entries[0]);
}
