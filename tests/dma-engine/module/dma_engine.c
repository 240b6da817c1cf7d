// SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause
/*
 * Gives a process an address space on nestling's DMA test engine: its own (SVA), or a new one that
 * the kernel's IOMMU API fills.
 *
 * One node per device, /dev/dma-engine-<PCI address>. An open file can bind the process that
 * asks (DMA_ENGINE_BIND gives the PASID), or have a PASID whose address space is SPACE_SIZE bytes
 * of new memory at SPACE_IOVA (DMA_ENGINE_SPACE, on kernels that attach domains to PASIDs), or a
 * PASID with no address space (DMA_ENGINE_PASID, on kernels whose allocator can be the host's by
 * virtual commands), put the device into a domain of its own (DMA_ENGINE_JOIN), count interrupts,
 * and map pages of BAR 0 (the offset of the mapping is the offset into the BAR; the MSI-X pages are
 * left out) and that memory (at SPACE_OFFSET). DMA_ENGINE_UNBIND, closing it, or unplugging the
 * device, ends what the PASID means; closing it also frees the PASID, and the last mapping goes
 * before the memory does. What the pages mean is in devices/src/testdev/README.md.
 *
 * For test machines only: whoever may open the node may make the device do any DMA that its
 * PASIDs and its default domain allow.
 */
#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/iommu.h>
#include <linux/kref.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/pci-ats.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>

#define DMA_ENGINE_BIND _IOR('N', 1, __u32)
#define DMA_ENGINE_UNBIND _IO('N', 2)
#define DMA_ENGINE_PASID _IOR('N', 3, __u32)
/*
 * The device in a domain of the driver's own, until DMA_ENGINE_LEAVE or the file is closed: what is
 * mapped there is a page of the driver's (place MAP_OWN) or any address, RAM or not.
 */
#define DMA_ENGINE_JOIN _IO('N', 4)
#define DMA_ENGINE_LEAVE _IO('N', 5)
#define DMA_ENGINE_MAP _IOW('N', 6, struct engine_mapping)
#define DMA_ENGINE_UNMAP _IOW('N', 7, struct engine_mapping)
/* How often vector 0 has interrupted; the first call requests it. */
#define DMA_ENGINE_INTERRUPTS _IOR('N', 8, __u32)

#define MAP_OWN (~0ULL)

struct engine_mapping {
	__u64 iova;
	__u64 place;
	__u64 size;
};
#define DMA_ENGINE_SPACE _IOR('N', 9, __u32)

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
#include <linux/ioasid.h>
#endif

/* The MSI-X table and pending bits: whoever writes them makes the device write anywhere. */
#define MSIX_FIRST (0x1000 >> PAGE_SHIFT)
#define MSIX_LAST (0x3000 >> PAGE_SHIFT)
#define BAR_PAGES (0x80000 >> PAGE_SHIFT)

/* Domains of PASIDs: iommu_attach_device_pasid with a handle, iommu_paging_domain_alloc. */
#define HAS_SPACES (LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0))
#define SPACE_OFFSET (0x100000 >> PAGE_SHIFT)
#define SPACE_SIZE 0x10000
#define SPACE_IOVA 0x500000000UL

struct engine {
	struct kref kref;
	/*
	 * lock: who binds. Held while the process's mmap_lock is taken (SVA does), so page faults
	 * have a lock of their own: lock, then mmap_lock, then pages.
	 */
	struct mutex lock;
	struct mutex pages;
	struct pci_dev *pci;		/* NULL once unplugged; changed under both locks */
	struct list_head openers;
	struct opener *joined;		/* whose the domain is */
	struct iommu_domain *domain;
	unsigned long own;		/* a page that can be mapped there */
	bool interrupts;
	atomic_t count;
	struct miscdevice misc;
	char name[48];
};

struct opener {
	struct engine *engine;
	struct list_head link;
	struct address_space *mapping;
	struct iommu_sva *sva;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
	ioasid_t pasid;			/* or INVALID_IOASID */
#endif
#if HAS_SPACES
	struct iommu_domain *domain;	/* attached to `space` of the device */
	struct device *device;
	ioasid_t space;			/* or IOMMU_PASID_INVALID */
	void *memory;			/* of SPACE_SIZE bytes, or NULL; it stays until the file is closed */
#endif
};

static void engine_free(struct kref *kref)
{
	struct engine *engine = container_of(kref, struct engine, kref);

	free_page(engine->own);
	kfree(engine);
}

static void opener_unbind(struct opener *opener)
{
	if (opener->sva)
		iommu_sva_unbind_device(opener->sva);
	opener->sva = NULL;
#if HAS_SPACES
	if (opener->domain) {
		iommu_detach_device_pasid(opener->domain, opener->device, opener->space);
		iommu_domain_free(opener->domain);
	}
	opener->domain = NULL;
#endif
}

static long engine_join(struct engine *engine, struct opener *opener)
{
	struct iommu_domain *domain;
	int result;

	if (!engine->pci)
		return -ENODEV;
	if (engine->domain)
		return -EBUSY;
	if (!engine->own)
		engine->own = get_zeroed_page(GFP_KERNEL);
	if (!engine->own)
		return -ENOMEM;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
	domain = iommu_domain_alloc(&pci_bus_type);
	if (!domain)
		return -ENODEV;
#else
	domain = iommu_paging_domain_alloc(&engine->pci->dev);
	if (IS_ERR(domain))
		return PTR_ERR(domain);
#endif
	result = iommu_attach_device(domain, &engine->pci->dev);
	if (result) {
		iommu_domain_free(domain);
		return result;
	}
	engine->domain = domain;
	engine->joined = opener;
	return 0;
}

static void engine_leave(struct engine *engine, struct opener *opener)
{
	if (!engine->domain || engine->joined != opener)
		return;
	iommu_detach_device(engine->domain, &engine->pci->dev);
	iommu_domain_free(engine->domain);
	engine->domain = NULL;
	engine->joined = NULL;
}

static long engine_map(struct engine *engine, const void __user *from, bool map)
{
	struct engine_mapping mapping;
	phys_addr_t place;

	if (copy_from_user(&mapping, from, sizeof(mapping)))
		return -EFAULT;
	if (!engine->domain)
		return -ENODEV;
	if (!map)
		return iommu_unmap(engine->domain, mapping.iova, mapping.size) == mapping.size ?
			0 : -EINVAL;
	place = mapping.place == MAP_OWN ? virt_to_phys((void *)engine->own) : mapping.place;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
	return iommu_map(engine->domain, mapping.iova, place, mapping.size,
			IOMMU_READ | IOMMU_WRITE);
#else
	return iommu_map(engine->domain, mapping.iova, place, mapping.size,
			IOMMU_READ | IOMMU_WRITE, GFP_KERNEL);
#endif
}

static irqreturn_t engine_interrupt(int irq, void *data)
{
	struct engine *engine = data;

	atomic_inc(&engine->count);
	return IRQ_HANDLED;
}

static long engine_interrupts(struct engine *engine, __u32 __user *to)
{
	int result;

	if (!engine->pci)
		return -ENODEV;
	if (!engine->interrupts) {
		result = pci_alloc_irq_vectors(engine->pci, 1, 1, PCI_IRQ_MSIX);
		if (result < 0)
			return result;
		result = request_irq(pci_irq_vector(engine->pci, 0), engine_interrupt, 0,
				"dma_engine", engine);
		if (result) {
			pci_free_irq_vectors(engine->pci);
			return result;
		}
		engine->interrupts = true;
	}
	return put_user(atomic_read(&engine->count), to);
}

#if HAS_SPACES
static long opener_space(struct opener *opener, __u32 __user *to)
{
	struct iommu_domain *domain;
	struct device *device;
	void *memory;
	long result;

	if (!opener->engine->pci)
		return -ENODEV;
	if (opener->memory)
		return -EBUSY;
	device = &opener->engine->pci->dev;
	memory = (void *)__get_free_pages(GFP_KERNEL | __GFP_ZERO, get_order(SPACE_SIZE));
	if (!memory)
		return -ENOMEM;
	domain = iommu_paging_domain_alloc(device);
	result = PTR_ERR_OR_ZERO(domain);
	if (result)
		goto no_domain;
	result = iommu_map(domain, SPACE_IOVA, virt_to_phys(memory), SPACE_SIZE,
			   IOMMU_READ | IOMMU_WRITE, GFP_KERNEL);
	if (result)
		goto no_pasid;
	result = -ENOSPC;
	opener->space = iommu_alloc_global_pasid(device);
	if (opener->space == IOMMU_PASID_INVALID)
		goto no_pasid;
	result = put_user(opener->space, to);
	if (!result)
		result = iommu_attach_device_pasid(domain, device, opener->space, NULL);
	if (result)
		goto not_attached;
	opener->domain = domain;
	opener->device = device;
	mutex_lock(&opener->engine->pages);
	opener->memory = memory;
	mutex_unlock(&opener->engine->pages);
	return 0;

not_attached:
	iommu_free_global_pasid(opener->space);
	opener->space = IOMMU_PASID_INVALID;
no_pasid:
	iommu_domain_free(domain);
no_domain:
	free_pages((unsigned long)memory, get_order(SPACE_SIZE));
	return result;
}

static void opener_free_space(struct opener *opener)
{
	if (opener->space != IOMMU_PASID_INVALID)
		iommu_free_global_pasid(opener->space);
	if (opener->memory)
		free_pages((unsigned long)opener->memory, get_order(SPACE_SIZE));
}

/* The memory stays until the file is closed, and the mapping holds the file. */
static int space_mmap(struct opener *opener, struct vm_area_struct *vma)
{
	unsigned long size = vma->vm_end - vma->vm_start;
	int result = -EINVAL;

	mutex_lock(&opener->engine->pages);
	if (opener->memory && size <= SPACE_SIZE)
		result = remap_pfn_range(vma, vma->vm_start,
					 virt_to_phys(opener->memory) >> PAGE_SHIFT, size,
					 vma->vm_page_prot);
	mutex_unlock(&opener->engine->pages);
	return result;
}
#else
static long opener_space(struct opener *opener, __u32 __user *to)
{
	return -EOPNOTSUPP;
}

static void opener_free_space(struct opener *opener)
{
}

static int space_mmap(struct opener *opener, struct vm_area_struct *vma)
{
	return -EINVAL;
}
#endif

static int engine_open(struct inode *inode, struct file *file)
{
	struct engine *engine = container_of(file->private_data, struct engine, misc);
	struct opener *opener = kzalloc(sizeof(*opener), GFP_KERNEL);

	if (!opener)
		return -ENOMEM;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
	opener->pasid = INVALID_IOASID;
#endif
#if HAS_SPACES
	opener->space = IOMMU_PASID_INVALID;
#endif
	opener->engine = engine;
	opener->mapping = file->f_mapping;
	kref_get(&engine->kref);
	mutex_lock(&engine->lock);
	list_add(&opener->link, &engine->openers);
	mutex_unlock(&engine->lock);
	file->private_data = opener;
	return 0;
}

static int engine_release(struct inode *inode, struct file *file)
{
	struct opener *opener = file->private_data;
	struct engine *engine = opener->engine;

	mutex_lock(&engine->lock);
	opener_unbind(opener);
	engine_leave(engine, opener);
	list_del(&opener->link);
	mutex_unlock(&engine->lock);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
	if (opener->pasid != INVALID_IOASID)
		ioasid_free(opener->pasid);
#endif
	opener_free_space(opener);
	kfree(opener);
	kref_put(&engine->kref, engine_free);
	return 0;
}

static long opener_bind(struct opener *opener, __u32 __user *to)
{
	struct iommu_sva *sva;
	__u32 pasid;

	if (!opener->engine->pci)
		return -ENODEV;
	if (opener->sva)
		return -EBUSY;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
	sva = iommu_sva_bind_device(&opener->engine->pci->dev, current->mm, NULL);
#else
	sva = iommu_sva_bind_device(&opener->engine->pci->dev, current->mm);
#endif
	if (IS_ERR(sva))
		return PTR_ERR(sva);
	pasid = iommu_sva_get_pasid(sva);
	if (put_user(pasid, to)) {
		iommu_sva_unbind_device(sva);
		return -EFAULT;
	}
	opener->sva = sva;
	return 0;
}

/*
 * Not the process's own PASID (iommu_sva_alloc_pasid): 6.1 never frees such a one by a virtual
 * command, since its driver takes a PASID with private data, as the process's is, for one in use.
 */
static long opener_pasid(struct opener *opener, __u32 __user *to)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0)
	int max;

	if (!opener->engine->pci)
		return -ENODEV;
	if (opener->pasid != INVALID_IOASID)
		return -EBUSY;
	max = pci_max_pasids(opener->engine->pci);
	if (max <= 1)
		return max < 0 ? max : -ENODEV;
	opener->pasid = ioasid_alloc(NULL, 1, max - 1, NULL);
	if (opener->pasid == INVALID_IOASID)
		return -ENOSPC;
	return put_user(opener->pasid, to);
#else
	return -EOPNOTSUPP;
#endif
}

static long engine_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct opener *opener = file->private_data;
	long result = 0;

	mutex_lock(&opener->engine->lock);
	switch (command) {
	case DMA_ENGINE_BIND:
		result = opener_bind(opener, (__u32 __user *)argument);
		break;
	case DMA_ENGINE_UNBIND:
		opener_unbind(opener);
		break;
	case DMA_ENGINE_PASID:
		result = opener_pasid(opener, (__u32 __user *)argument);
		break;
	case DMA_ENGINE_JOIN:
		result = engine_join(opener->engine, opener);
		break;
	case DMA_ENGINE_LEAVE:
		engine_leave(opener->engine, opener);
		break;
	case DMA_ENGINE_MAP:
	case DMA_ENGINE_UNMAP:
		result = engine_map(opener->engine, (void __user *)argument,
				command == DMA_ENGINE_MAP);
		break;
	case DMA_ENGINE_INTERRUPTS:
		result = engine_interrupts(opener->engine, (__u32 __user *)argument);
		break;
	case DMA_ENGINE_SPACE:
		result = opener_space(opener, (__u32 __user *)argument);
		break;
	default:
		result = -ENOTTY;
	}
	mutex_unlock(&opener->engine->lock);
	return result;
}

static vm_fault_t engine_fault(struct vm_fault *fault)
{
	struct opener *opener = fault->vma->vm_private_data;
	struct engine *engine = opener->engine;
	vm_fault_t result = VM_FAULT_SIGBUS;

	mutex_lock(&engine->pages);
	if (engine->pci)
		result = vmf_insert_pfn(fault->vma, fault->address,
			(pci_resource_start(engine->pci, 0) >> PAGE_SHIFT) + fault->pgoff);
	mutex_unlock(&engine->pages);
	return result;
}

static const struct vm_operations_struct engine_pages = {
	.fault = engine_fault,
};

static int engine_mmap(struct file *file, struct vm_area_struct *vma)
{
	unsigned long first = vma->vm_pgoff;
	unsigned long pages = vma_pages(vma);

	if (first == SPACE_OFFSET)
		return space_mmap(file->private_data, vma);
	if (first >= BAR_PAGES || pages > BAR_PAGES - first)
		return -EINVAL;
	if (first < MSIX_LAST && first + pages > MSIX_FIRST)
		return -EINVAL;
	vma->vm_private_data = file->private_data;
	vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
	vma->vm_ops = &engine_pages;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
	vma->vm_flags |= VM_IO | VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP;
#else
	vm_flags_set(vma, VM_IO | VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
#endif
	return 0;
}

static const struct file_operations engine_operations = {
	.owner = THIS_MODULE,
	.open = engine_open,
	.release = engine_release,
	.unlocked_ioctl = engine_ioctl,
	.mmap = engine_mmap,
};

static int engine_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	struct engine *engine;
	int result = pcim_enable_device(pci);

	if (result)
		return result;
	if (pci_resource_len(pci, 0) >> PAGE_SHIFT < BAR_PAGES)
		return -ENODEV;
	result = dma_set_mask_and_coherent(&pci->dev, DMA_BIT_MASK(64));
	if (result)
		return result;
	pci_set_master(pci);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
	/* Without page requests SVA still works for pages that are there. */
	result = iommu_dev_enable_feature(&pci->dev, IOMMU_DEV_FEAT_IOPF);
	pci_info(pci, "page requests: %d\n", result);
	result = iommu_dev_enable_feature(&pci->dev, IOMMU_DEV_FEAT_SVA);
	if (result)
		pci_info(pci, "no SVA: %d\n", result);
#endif
	engine = kzalloc(sizeof(*engine), GFP_KERNEL);
	if (!engine)
		return -ENOMEM;
	kref_init(&engine->kref);
	mutex_init(&engine->lock);
	mutex_init(&engine->pages);
	INIT_LIST_HEAD(&engine->openers);
	engine->pci = pci;
	snprintf(engine->name, sizeof(engine->name), "dma-engine-%s", pci_name(pci));
	engine->misc.minor = MISC_DYNAMIC_MINOR;
	engine->misc.name = engine->name;
	engine->misc.fops = &engine_operations;
	engine->misc.parent = &pci->dev;
	result = misc_register(&engine->misc);
	if (result) {
		kref_put(&engine->kref, engine_free);
		return result;
	}
	pci_set_drvdata(pci, engine);
	return 0;
}

static void engine_remove(struct pci_dev *pci)
{
	struct engine *engine = pci_get_drvdata(pci);
	struct opener *opener;

	misc_deregister(&engine->misc);
	mutex_lock(&engine->lock);
	engine_leave(engine, engine->joined);
	if (engine->interrupts) {
		free_irq(pci_irq_vector(pci, 0), engine);
		pci_free_irq_vectors(pci);
		engine->interrupts = false;
	}
	mutex_lock(&engine->pages);
	engine->pci = NULL;
	mutex_unlock(&engine->pages);
	list_for_each_entry(opener, &engine->openers, link) {
		unmap_mapping_range(opener->mapping, 0, 0, 1);
		opener_unbind(opener);
	}
	mutex_unlock(&engine->lock);
	pci_clear_master(pci);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
	iommu_dev_disable_feature(&pci->dev, IOMMU_DEV_FEAT_SVA);
	iommu_dev_disable_feature(&pci->dev, IOMMU_DEV_FEAT_IOPF);
#endif
	kref_put(&engine->kref, engine_free);
}

static const struct pci_device_id engine_ids[] = {
	{ PCI_DEVICE(0x1af4, 0x10f0) },
	{ }
};
MODULE_DEVICE_TABLE(pci, engine_ids);

static struct pci_driver engine_driver = {
	.name = "dma_engine",
	.id_table = engine_ids,
	.probe = engine_probe,
	.remove = engine_remove,
};
module_pci_driver(engine_driver);

MODULE_DESCRIPTION("SVA on nestling's DMA test engine");
MODULE_LICENSE("Dual BSD/GPL");
