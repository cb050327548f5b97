"""The segmentation discriminator (Sec. 3.1, Fig. 2 B): a ResNet-101 + UperNet with N+1 outputs, and its losses.

Real images should be segmented into their layout; in generated ones every pixel should be found to be class N, "fake".
Attribute names are mit-semseg's (`encoder.`, `decoder.`), whose ADE20K segmenter the official discriminator starts from.
"""
import torch
import torch.nn.functional as F
from torch import nn

IGNORE = 255    # void pixels of a label map: they count nowhere


def conv_bn(cin, cout, kernel, stride=1):
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


def resize(x, like):
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class Bottleneck(nn.Module):
    def __init__(self, cin, width, stride):
        super().__init__()
        cout = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.downsample = nn.Identity()
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))


class ResNet(nn.Module):
    """Image -> feature maps at 1/4, 1/8, 1/16, 1/32 (with stem_stride 4), of 4, 8, 16 and 32 `width` channels."""

    def __init__(self, layers=(3, 4, 23, 3), width=64, stem_stride=4):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2, 1) if stem_stride == 4 else nn.Identity()
        self.conv1 = nn.Conv2d(3, width, 3, 2 if stem_stride > 1 else 1, 1, bias=False)   # a stem of three 3x3
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width)
        cin = 2 * width
        for i, blocks in enumerate(layers):
            w = width * 2 ** i
            stage = [Bottleneck(cin if j == 0 else 4 * w, w, 2 if i and j == 0 else 1) for j in range(blocks)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            cin = 4 * w

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.pool(F.relu(self.bn3(self.conv3(x))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class UperNetHead(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid down to the finest, all of it fused at that resolution."""

    def __init__(self, num_classes, channels, dim=256):
        super().__init__()
        self.ppm_conv = nn.ModuleList(conv_bn(channels[-1], 2 * dim, 1) for _ in range(4))
        self.ppm_last_conv = conv_bn(channels[-1] + 4 * 2 * dim, dim, 3)
        self.fpn_in = nn.ModuleList(conv_bn(c, dim, 1) for c in channels[:-1])
        self.fpn_out = nn.ModuleList(nn.Sequential(conv_bn(dim, dim, 3)) for _ in channels[:-1])
        self.conv_last = nn.Sequential(conv_bn(4 * dim, dim, 3), nn.Conv2d(dim, num_classes, 1))

    def forward(self, maps):
        top = maps[-1]
        pooled = [conv(resize(F.adaptive_avg_pool2d(top, s), top)) for s, conv in zip((1, 2, 3, 6), self.ppm_conv)]
        f = self.ppm_last_conv(torch.cat([top, *pooled], dim=1))
        pyramid = [f]
        for x, lateral, out in reversed(list(zip(maps, self.fpn_in, self.fpn_out))):
            x = lateral(x)
            f = x + resize(f, x)
            pyramid.append(out(f))
        pyramid = [resize(p, pyramid[-1]) for p in reversed(pyramid)]       # finest first
        return self.conv_last(torch.cat(pyramid, dim=1))


class UperNet(nn.Module):
    """image [B,3,H,W] in [-1,1] -> logits [B,num_classes,H,W]. `normalize` feeds ImageNet's mean and std instead of
    [-1,1], as the official ADE20K training does. A stem_stride below 4 keeps the small objects of small images."""

    def __init__(self, num_classes, layers=(3, 4, 23, 3), width=64, fpn_dim=256, stem_stride=4, normalize=False):
        super().__init__()
        self.encoder = ResNet(layers, width, stem_stride)
        self.decoder = UperNetHead(num_classes, [4 * width * 2 ** i for i in range(4)], fpn_dim)
        self.normalize = normalize

    def features(self, image):
        """image [B,3,H,W] -> the encoder's four maps."""
        if self.normalize:
            mean, std = (image.new_tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            image = ((image + 1) / 2 - mean) / std
        return self.encoder(image)

    def forward(self, image):
        return resize(self.decoder(self.features(image)), image)


class Classifier(nn.Module):
    """image [B,3,H,W] in [-1,1] -> logits [B,num_classes] of the whole image: judges the toy world's domains."""

    def __init__(self, num_classes, layers=(1, 1, 1, 1), width=8, stem_stride=2):
        super().__init__()
        self.encoder = ResNet(layers, width, stem_stride)
        self.head = nn.Linear(32 * width, num_classes)

    def forward(self, image):
        return self.head(self.encoder(image)[-1].mean((2, 3)))


# -- losses (Sec. 3.1) ------------------------------------------------------------------------------------------------


def class_balance(label, num_classes):
    """gamma_c of each pixel: the inverse frequency of its class in the batch. label [B,H,W] int64 -> weight [B,H,W].

    n_valid / (count_c * n_present * num_classes), and 0 where the label is void; so sum(weight * loss) / n_valid is
    1/num_classes times the mean, over the classes present, of each class's mean loss.
    """
    classes = torch.arange(num_classes, device=label.device)
    count = (label.flatten()[:, None] == classes).sum(0).float()    # no bincount: it would wait for the GPU
    valid = label != IGNORE
    gamma = valid.sum() / (count.clamp(min=1) * (count > 0).sum().clamp(min=1) * num_classes)
    return gamma[label.where(valid, 0)] * valid


def layout_loss_map(logits, label):
    """gamma_c * CE(Dis(x0_hat), y) of each pixel: logits [B,N+1,H,W], label [B,H,W] -> [B,H,W] fp32, 0 at void pixels.
    Its sum over the number of valid pixels is L_adv."""
    ce = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    return class_balance(label, logits.shape[1]) * ce


def per_valid_pixel(loss_map, label):
    """Sum of a map of losses [B,H,W] over the number of its valid pixels."""
    return loss_map.sum() / (label != IGNORE).sum().clamp(min=1)


def discriminator_loss(real_logits, fake_logits, label, fake_weight):
    """L_Dis: real images should be segmented into their layout, in fakes every pixel should be class N (the last one).

    real_logits, fake_logits [B,N+1,H,W], label [B,H,W] -> scalar, {"real": scalar, "fake": scalar}
    """
    real = per_valid_pixel(layout_loss_map(real_logits, label), label)
    fake = -F.log_softmax(fake_logits.float(), dim=1)[:, -1].mean()
    return real + fake_weight * fake, {"real": real, "fake": fake}


# -- evaluation -------------------------------------------------------------------------------------------------------


def confusion_matrix(pred, label, num_classes):
    """pred, label [...] int64 -> [num_classes,num_classes] int64 counts; rows are the true classes; void is left out."""
    valid = label != IGNORE
    return torch.bincount(label[valid] * num_classes + pred[valid], minlength=num_classes ** 2).view(num_classes, -1)


def mean_iou(confusion):
    """confusion [N,N] (rows: true) -> mean IoU, IoU per class [N]; a class that is neither there nor predicted is nan."""
    hit = confusion.diag().double()
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
    return iou.nanmean().item(), iou


# -- as a plain segmenter: the downstream task of the paper's Table 4 -------------------------------------------------


def fit_segmenter(net, stream, steps, lr=0.02, device="cpu"):
    """Train on batches of {"image": [B,3,H,W], "label": [B,H,W]}: SGD, cross-entropy, polynomial decay, as mit-semseg."""
    from tqdm import trange
    net.to(device).train()
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    for step in (bar := trange(steps, desc="segmenter")):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - step / steps) ** 0.9
        batch = next(stream)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=torch.device(device).type == "cuda"):
            logits = net(batch["image"].to(device))
        loss = F.cross_entropy(logits.float(), batch["label"].to(device), ignore_index=IGNORE)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return net.eval()


@torch.no_grad()
def test_segmenter(net, dataset, num_classes, device="cpu"):
    """-> confusion [N,N] of the segmenter's answers (class "fake", if it has one, left out) on a whole dataset."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for i in range(len(dataset)):
        item = dataset[i]
        pred = net(item["image"][None].to(device))[0, :num_classes].argmax(0).cpu()
        confusion += confusion_matrix(pred, item["label"], num_classes)
    return confusion


def main():
    import argparse
    import sys
    from pathlib import Path
    from data import InputError, batches, open_dataset, refuse
    p = argparse.ArgumentParser(description="Train the UperNet as a plain segmenter, and test it.")
    p.add_argument("--data", default="toy", help="toy, cityscapes, ade20k, coco, or a folder; toy:night is one domain, toy:all all")
    p.add_argument("--root", help="the folder of --data")
    p.add_argument("--extra", nargs="*", default=[], help="more training data: folders that sample.py --layouts has written")
    p.add_argument("--test", nargs="+", help="what to test on (default: --data): names as for --data, or NAME=ROOT")
    p.add_argument("--preset", choices=["toy", "sd15"], help="size of the network (default: toy for the toy, else sd15)")
    p.add_argument("--size", type=int, help="pixels (default 64 for the toy, else 512)")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="cpu or cuda (default: cuda if there)")
    p.add_argument("--out", default="segmenter.pt", help="where the weights go (sample.py --evaluate --judge FILE)")
    p.error = refuse
    try:
        args = p.parse_args()
        if min(args.steps, args.batch) < 1:
            raise InputError("--steps and --batch: whole numbers from 1")
        if not Path(args.out).resolve().parent.is_dir():
            raise InputError(f"--out {args.out}: there is no such folder")
        from aldm import PRESETS, atomic, pick_device
        args.device = pick_device(args.device)
        preset = PRESETS[args.preset or ("toy" if args.data.startswith("toy") else "sd15")]
        size = args.size or preset.size

        def load(name, split):
            name, _, root = name.partition("=")
            return open_dataset(name, root or (args.root if name == args.data else None), split, size, grid=1,
                                augment=split == "train")

        source = [load(args.data, "train"), *(load(extra, "train") for extra in args.extra)]
        tests = {name: load(name, "val") for name in args.test or [args.data]}
        num_classes = len(source[0].classes.names)
        for dataset, name in zip([*source[1:], *tests.values()], [*args.extra, *tests]):
            if dataset.classes.names != source[0].classes.names:
                raise InputError(f"{name}: its {len(dataset.classes.names)} classes are not the {num_classes} of {args.data}")
        torch.manual_seed(args.seed)
        net = UperNet(num_classes, **preset.segmenter)
        # every set gives as many images to a batch, however large it is
        share = [batches(d, -(-args.batch // len(source)), args.seed + i) for i, d in enumerate(source)]
        stream = ({k: torch.cat([b[k] for b in part]) for k in ("image", "label")} for part in zip(*share))
        fit_segmenter(net, stream, args.steps, args.lr, args.device)
        with atomic(args.out) as temporary:
            torch.save({f"segmenter.{name}": t for name, t in net.state_dict().items()}, temporary)
        for name, dataset in tests.items():
            miou, iou = mean_iou(test_segmenter(net, dataset, num_classes, args.device))
            print(f"{name}: mIoU {miou:.4f}  " + "  ".join(
                f"{n} {v:.3f}" for n, v in zip(source[0].classes.names, iou.tolist()) if v == v))
    except (InputError, OSError) as error:
        print(f"discriminator.py: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
